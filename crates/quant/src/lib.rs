//! emberlora-quant
