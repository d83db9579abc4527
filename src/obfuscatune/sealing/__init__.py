"""Sealed data: bundles of files that may lie on any storage, and what opens them. No torch.

keys      a bundle's key, and what is derived of it
manifest  which files, in which chunks: signed by whoever sealed
seal      a directory -> a bundle
opening   a bundle and its key -> a directory that exists in this process's memory alone
storage   where bundles lie: a path, or what fsspec opens
"""
