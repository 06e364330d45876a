"""Imported once in the fork server: every rank of every test starts with the engines loaded."""

import os
import warnings

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also where there is a GPU: gloo ranks cannot share one
os.environ["OMP_NUM_THREADS"] = "1"
warnings.filterwarnings("ignore")

__import__("tests.support.training")
