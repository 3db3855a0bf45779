//! emberlora-model
