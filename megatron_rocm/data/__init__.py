"""Text to tokens on disk (`prepare`), what is known of them (`facts`), and torch datasets over them (`datasets`).

Only `datasets` imports torch and megatron-core; everything else answers in a fraction of a second.
"""
