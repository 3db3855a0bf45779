//! What there is to choose from.

use burn::tensor::Device;
use emberlora_config::DeviceChoice;
use emberlora_quant::FloatDtype;

use super::{Backend, Hardware, formats};
use crate::process::{processor_name, total_memory_bytes};

/// A device of this machine that this build can use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundDevice {
    /// What to write in a recipe to get it.
    pub choice: DeviceChoice,
    /// Which backend it belongs to.
    pub backend: Backend,
    /// What it is made of.
    pub hardware: Hardware,
    /// What it calls itself; a processor's name ends with the number of threads that may run on it.
    pub name: String,
    /// Bytes of its memory, the system's for a processor; `None` where the driver does not say.
    pub memory: Option<u64>,
    /// The formats in which it holds weights and computes.
    pub dtypes: Vec<FloatDtype>,
}

/// Every device that this build finds on this machine. Each is opened, so that it can say what it is.
pub fn found() -> Vec<FoundDevice> {
    let devices = |backend: Backend| {
        backend.devices().into_iter().enumerate().map(move |(index, device)| FoundDevice {
            choice: backend.choice(index),
            backend,
            hardware: Hardware::of(&device),
            name: name_of(&device),
            memory: memory_of(&device),
            dtypes: formats(&device),
        })
    };
    Backend::ALL.into_iter().flat_map(devices).collect()
}

/// What `device` calls itself.
pub(super) fn name_of(device: &Device) -> String {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    if let Some(identity) = device.identity() {
        return identity.name;
    }
    if Hardware::of(device) != Hardware::Cpu {
        return "unnamed".to_owned();
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let plural = if threads == 1 { "" } else { "s" };
    format!("{}, {threads} thread{plural}", processor_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned()))
}

fn memory_of(device: &Device) -> Option<u64> {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    if let burn::backend::DispatchDevice::Cube(device) = device.as_dispatch() {
        return device.client().properties().memory.max_memory();
    }
    if Hardware::of(device) == Hardware::Cpu { total_memory_bytes() } else { None }
}
