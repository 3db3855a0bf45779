//! emberlora-config
