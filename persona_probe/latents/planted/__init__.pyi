from .planted_run import PlantedSettings as PlantedSettings
from .planted_run import run_planted as run_planted
from .planted_table import format_table as format_table
