"""``report.html`` and ``report.md``: what runs have shown, in tables and pictures."""
