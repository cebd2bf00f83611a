from .hooks import read_place as read_place
from .hooks import sae_layer as sae_layer
from .hooks import write_place as write_place
from .load import load_sae as load_sae
from .quality import check_explained_variance as check_explained_variance
from .quality import quality_report as quality_report
from .sae_training import train_sae as train_sae
from .stream import SaeConfig as SaeConfig
