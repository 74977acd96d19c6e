"""Storage of keys, values and states of one layer, free of any host library.

store: what every layer's storage offers. quantization: formats. paged: pages with key statistics. streaming: sinks and
a ring of recent pages. lserve: both kinds of heads of one layer. Their adapters to host caches live in integrations/.
"""
