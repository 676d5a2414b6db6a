"""Draws on a server that loads adapters."""

from bayeslora.serving.averaging import Averaged as Averaged
from bayeslora.serving.averaging import average as average
