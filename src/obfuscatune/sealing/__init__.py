"""Sealed data: bundles of files that may lie on any storage, and what opens them. No torch.

source        a folder of the sealer's own -> its files, checked before long work begins
keys          a bundle's key, and what is derived of it
parallel      chunks in threads
seal          files -> chunks, the manifest last
manifest      which files, in which chunks: signed by whoever sealed, then encrypted
storage       where bundles lie, untrusted: a path, or what fsspec opens
opening       a bundle and its key -> files
memory_files  files that exist in this process's memory alone
key_file      the file that a sealer keeps a bundle's key in
blobs         small secrets at rest: the service's state
"""
