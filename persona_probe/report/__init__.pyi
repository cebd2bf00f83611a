from . import figures as figures
from .cards import FeatureCard as FeatureCard
from .export import export_figures as export_figures
from .figures.registry import FigureSpec as FigureSpec
from .html import write_report as write_report
from .records import Records as Records
from .records import load_records as load_records
from .theme import for_print as for_print
