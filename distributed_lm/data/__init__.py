"""From text to batches: tokenizers, prepared data sets, the order of training, the data ledger.

``prepare_data.py`` uses, in the order of the work: ``inputs`` (find files, cut them into shards),
``corpus`` (read documents), ``tokenizer``, ``shards`` and ``workers`` (tokenise), ``merge``
(publish), ``manifest`` (what was made). Training uses ``batches`` and ``index_cache``.
"""
