from .merge import merge as merge
from .ray_workers import RayWorkers as RayWorkers
from .sharing import Shard as Shard
from .sharing import Sharing as Sharing
