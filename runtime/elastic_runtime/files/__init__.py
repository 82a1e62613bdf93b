"""The only writers of the product: `atomic` writes one file, `folder` a bundle, and `cache` says where caches lie."""
