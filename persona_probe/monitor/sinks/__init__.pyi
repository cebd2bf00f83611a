from .files import JsonlSink as JsonlSink
from .files import read_events as read_events
from .files import readings_frame as readings_frame
from .live import LiveView as LiveView
from .prometheus import PrometheusSink as PrometheusSink
from .sink import Sink as Sink
from .terminal import TerminalSink as TerminalSink
from .trainer_log import TrainerLogSink as TrainerLogSink
