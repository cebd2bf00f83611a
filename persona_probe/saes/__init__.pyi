from .load import load_sae as load_sae
from .load import sae_layer as sae_layer
from .quality import check_explained_variance as check_explained_variance
from .quality import quality_report as quality_report
from .sae_training import train_sae as train_sae
from .stream import SaeConfig as SaeConfig
