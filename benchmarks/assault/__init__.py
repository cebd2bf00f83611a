"""`make assault`: kills, double starts, bad inputs, hostile text, faulty judges and a faulty monitor, counted."""
