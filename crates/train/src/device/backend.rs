//! The backends that a build can have, and the devices that each finds on this machine.

use std::fmt;

use burn::tensor::Device;
use emberlora_config::DeviceChoice;

/// A way to compute, chosen with a cargo feature of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The CPU, with bodies of its own for what a step spends its time on.
    Flex,
    /// The CPU through the `ndarray` crate, with the bodies that run anywhere. Burn has deprecated it.
    NdArray,
    /// GPUs of any maker through Vulkan, Metal, DirectX or OpenGL.
    Wgpu,
    /// NVIDIA's GPUs.
    Cuda,
}

/// What a device is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hardware {
    /// The processor.
    Cpu,
    /// A GPU with memory of its own.
    DiscreteGpu,
    /// A GPU that shares the processor's memory.
    IntegratedGpu,
    /// A GPU that a virtual machine was given.
    VirtualGpu,
    /// A GPU that does not say what it is.
    OtherGpu,
    /// A driver that plays a GPU on the processor, such as Mesa's llvmpipe: for tests.
    SoftwareGpu,
    /// Whatever a server hosts; it does not tell.
    Remote,
}

impl Backend {
    /// Every backend that there is.
    pub const ALL: [Self; 4] = [Self::Flex, Self::NdArray, Self::Wgpu, Self::Cuda];

    /// What it is called in recipes and among the cargo features.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Flex => "flex",
            Self::NdArray => "ndarray",
            Self::Wgpu => "wgpu",
            Self::Cuda => "cuda",
        }
    }

    /// Whether this build has it.
    pub const fn is_compiled_in(self) -> bool {
        match self {
            Self::Flex => cfg!(feature = "flex"),
            Self::NdArray => cfg!(feature = "ndarray"),
            Self::Wgpu => cfg!(feature = "wgpu"),
            Self::Cuda => cfg!(feature = "cuda"),
        }
    }

    /// Those that this build has.
    pub fn compiled_in() -> Vec<Self> {
        Self::ALL.into_iter().filter(|backend| backend.is_compiled_in()).collect()
    }

    /// What a machine must have for it.
    pub const fn needs(self) -> &'static str {
        match self {
            Self::Flex | Self::NdArray => "it runs on any processor",
            Self::Wgpu => {
                "it needs a GPU and its driver for Vulkan, Metal, DirectX or OpenGL (Debian: `apt-get install \
                 mesa-vulkan-drivers`, which also brings a software adapter for tests)"
            }
            Self::Cuda => "it needs an NVIDIA GPU and NVIDIA's driver (libcuda)",
        }
    }

    /// Its devices on this machine, in the order in which recipes count them. None is opened.
    pub(super) fn devices(self) -> Vec<Device> {
        match self {
            Self::Flex => flex(),
            Self::NdArray => ndarray(),
            Self::Wgpu => wgpu(),
            Self::Cuda => cuda(),
        }
    }

    /// The choice that leads to one of its devices.
    pub(super) fn choice(self, index: usize) -> DeviceChoice {
        match self {
            Self::Flex => DeviceChoice::Flex,
            Self::NdArray => DeviceChoice::NdArray,
            Self::Wgpu => DeviceChoice::Wgpu(Some(index)),
            Self::Cuda => DeviceChoice::Cuda(Some(index)),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Hardware {
    /// What `device` is made of.
    pub fn of(device: &Device) -> Self {
        of_cube(device).unwrap_or(Self::Cpu)
    }

    /// Whether there is a GPU behind it.
    pub const fn is_gpu(self) -> bool {
        !matches!(self, Self::Cpu | Self::SoftwareGpu | Self::Remote)
    }

    /// A few words for people.
    pub const fn description(self) -> &'static str {
        match self {
            Self::Cpu => "processor",
            Self::DiscreteGpu => "discrete GPU",
            Self::IntegratedGpu => "integrated GPU",
            Self::VirtualGpu => "virtual GPU",
            Self::OtherGpu => "GPU",
            Self::SoftwareGpu => "software adapter",
            Self::Remote => "device of a server",
        }
    }
}

/// `None` for a processor.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn of_cube(device: &Device) -> Option<Hardware> {
    use burn::backend::{CubeDevice, DispatchDevice};
    match device.clone().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(CubeDevice::Cuda(_)) => Some(Hardware::DiscreteGpu),
        #[cfg(feature = "wgpu")]
        DispatchDevice::Cube(CubeDevice::Wgpu(adapter)) => {
            use burn::backend::WgpuDeviceKind as Kind;
            Some(match adapter.kind {
                Kind::DiscreteGpu(_) => Hardware::DiscreteGpu,
                Kind::IntegratedGpu(_) => Hardware::IntegratedGpu,
                Kind::VirtualGpu(_) => Hardware::VirtualGpu,
                Kind::Cpu => Hardware::SoftwareGpu,
                Kind::Other(_) | Kind::DefaultDevice | Kind::Existing(_) => Hardware::OtherGpu,
            })
        }
        _ => None,
    }
}

#[cfg(not(any(feature = "wgpu", feature = "cuda")))]
fn of_cube(_: &Device) -> Option<Hardware> {
    None
}

#[cfg(feature = "flex")]
fn flex() -> Vec<Device> {
    vec![Device::flex()]
}

#[cfg(not(feature = "flex"))]
fn flex() -> Vec<Device> {
    Vec::new()
}

#[cfg(feature = "ndarray")]
#[expect(deprecated, reason = "Burn removes it after 0.22; it stays as an independent reference until then")]
fn ndarray() -> Vec<Device> {
    vec![Device::ndarray()]
}

#[cfg(not(feature = "ndarray"))]
fn ndarray() -> Vec<Device> {
    Vec::new()
}

#[cfg(feature = "wgpu")]
fn wgpu() -> Vec<Device> {
    Device::enumerate(burn::tensor::DeviceType::Wgpu).into_vec()
}

#[cfg(not(feature = "wgpu"))]
fn wgpu() -> Vec<Device> {
    Vec::new()
}

#[cfg(feature = "cuda")]
fn cuda() -> Vec<Device> {
    Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec()
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Vec<Device> {
    Vec::new()
}
