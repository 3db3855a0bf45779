//! emberlora-data
