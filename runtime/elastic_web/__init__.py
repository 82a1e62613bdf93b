"""Pictures in the browser itself: a static site that runs a bundle's ONNX file with onnxruntime-web.

`fitting` says which bundles a page can draw and from which artifacts, `library` finds onnxruntime-web, `site` writes the site, and `server`
shows it here. What runs in the browser is in `page/`, as it is: ES modules without a build step. No torch, no npm.
"""
