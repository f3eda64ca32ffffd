"""One GPU: operators against emulated links, kernels against the library, what kernels compile to."""
