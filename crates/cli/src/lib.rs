//! emberlora-cli
