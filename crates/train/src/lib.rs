//! emberlora-train
