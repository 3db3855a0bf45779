//! emberlora
pub use emberlora_cli as cli;
