//! emberlora-kernels
