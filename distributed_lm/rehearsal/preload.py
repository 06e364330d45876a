"""Imported once in the server that the rehearsal's processes are forked from, so that each begins
with the engines loaded. No GPU is looked at."""

import importlib

from distributed_lm import platform

platform.hide_gpus()
platform.quiet_engines()
importlib.import_module("distributed_lm.rehearsal.world")
importlib.import_module("distributed_lm.rehearsal.meta_device").install()
