"""Small scripts, one per question. Each measures its own ceiling in the same run.

python -m benchmarks.NAME          a table, and benchmarks/results/DEVICE/NAME.json
python -m benchmarks               all of them, compared with benchmarks/baseline.json
"""
