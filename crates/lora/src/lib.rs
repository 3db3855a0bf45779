//! emberlora-lora
