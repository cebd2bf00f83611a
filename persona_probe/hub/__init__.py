"""Share runs: to and from the Hugging Face hub, as W&B artifacts, and latents in Neuronpedia's upload format."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
