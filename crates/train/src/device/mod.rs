//! Where tensors live, and in which formats a device can hold them.

mod backend;
mod error;
mod found;

use burn::tensor::{DType, Device};
use emberlora_config::{DeviceChoice, Devices, Dtype};
use emberlora_quant::FloatDtype;

pub use backend::{Backend, Hardware};
pub use error::DeviceError;
pub use found::{FoundDevice, found};

use crate::remote;

/// A device and the choice that leads to it, with nothing left open.
#[derive(Clone, Debug)]
pub struct ChosenDevice {
    /// The device, without autodiff.
    pub device: Device,
    /// What to write in a recipe to get the same one; never [`DeviceChoice::Auto`].
    pub choice: DeviceChoice,
    /// What it is made of.
    pub hardware: Hardware,
    /// Why `auto` took it; `None` where the recipe names it.
    pub reason: Option<String>,
}

/// Opens the device that a recipe asks for.
///
/// `auto` is the first CUDA device, else the first wgpu adapter with a GPU behind it, else flex. It never takes a software
/// adapter and never ndarray. `wgpu` without a number is the first adapter with a GPU behind it, else the first there is.
///
/// # Errors
/// When the backend is not compiled in, its driver or the device is missing, or `auto` finds nothing.
pub fn choose(choice: &DeviceChoice) -> Result<ChosenDevice, DeviceError> {
    match choice {
        DeviceChoice::Auto => preferred(),
        DeviceChoice::Flex => named(Backend::Flex, None),
        DeviceChoice::NdArray => named(Backend::NdArray, None),
        DeviceChoice::Wgpu(index) => named(Backend::Wgpu, *index),
        DeviceChoice::Cuda(index) => named(Backend::Cuda, *index),
        DeviceChoice::Remote(address) => {
            let device = remote::connect(address)?;
            Ok(ChosenDevice { device, choice: choice.clone(), hardware: Hardware::Remote, reason: None })
        }
    }
}

/// Opens all devices that a recipe names, in its order.
///
/// # Errors
/// When one of them is not to be had, or two are the same.
pub fn choose_all(devices: &Devices) -> Result<Vec<ChosenDevice>, DeviceError> {
    let mut chosen: Vec<ChosenDevice> = Vec::with_capacity(devices.all().len());
    for choice in devices.all() {
        let next = choose(choice)?;
        if let Some(same) = chosen.iter().find(|other| other.device == next.device) {
            return Err(DeviceError::Twice { first: same.choice.clone(), second: choice.clone() });
        }
        chosen.push(next);
    }
    Ok(chosen)
}

fn named(backend: Backend, index: Option<usize>) -> Result<ChosenDevice, DeviceError> {
    if !backend.is_compiled_in() {
        return Err(DeviceError::NotCompiledIn { backend, available: Backend::compiled_in() });
    }
    let devices = backend.devices();
    let found = devices.len();
    if found == 0 {
        return Err(DeviceError::NoDevice { backend });
    }
    let index = index.unwrap_or_else(|| devices.iter().position(|device| Hardware::of(device).is_gpu()).unwrap_or(0));
    let device = devices.into_iter().nth(index).ok_or(DeviceError::NoSuchDevice { backend, index, found })?;
    let hardware = Hardware::of(&device);
    Ok(ChosenDevice { device, choice: backend.choice(index), hardware, reason: None })
}

fn preferred() -> Result<ChosenDevice, DeviceError> {
    let mut passed = Vec::new();
    for backend in [Backend::Cuda, Backend::Wgpu, Backend::Flex] {
        if !backend.is_compiled_in() {
            passed.push(format!("{backend} is not compiled in"));
            continue;
        }
        match named(backend, None) {
            Ok(chosen) if chosen.hardware == Hardware::SoftwareGpu => {
                passed.push(format!("{backend} has only a software adapter"));
            }
            Ok(chosen) => {
                let name = found::name_of(&chosen.device);
                passed.push(format!("{backend} has {name}"));
                return Ok(ChosenDevice { reason: Some(passed.join(", ")), ..chosen });
            }
            Err(_) => passed.push(format!("{backend} has no device here")),
        }
    }
    Err(DeviceError::NothingForAuto { passed })
}

impl ChosenDevice {
    /// The format of activations: what the recipe says; for `auto`, bf16 on a GPU that has it, else f32.
    ///
    /// # Errors
    /// When the device cannot compute in it.
    pub fn compute_dtype(&self, dtype: Dtype) -> Result<FloatDtype, DeviceError> {
        match explicit(dtype) {
            Some(dtype) => self.supported("model.compute_dtype", dtype),
            None if self.hardware.is_gpu() && has(&self.device, FloatDtype::Bf16) => Ok(FloatDtype::Bf16),
            None => Ok(FloatDtype::F32),
        }
    }

    /// The format in which frozen weights are kept; `None` keeps the files' own. For `auto` a device that lacks a
    /// format which files may have keeps f32.
    ///
    /// # Errors
    /// When the device cannot hold the one that the recipe names.
    pub fn weight_dtype(&self, dtype: Dtype) -> Result<Option<FloatDtype>, DeviceError> {
        match explicit(dtype) {
            Some(dtype) => self.supported("model.dtype", dtype).map(Some),
            None if formats(&self.device).len() < DTYPES.len() => Ok(Some(FloatDtype::F32)),
            None => Ok(None),
        }
    }

    fn supported(&self, key: &'static str, dtype: FloatDtype) -> Result<FloatDtype, DeviceError> {
        let available = formats(&self.device);
        if available.contains(&dtype) {
            return Ok(dtype);
        }
        Err(DeviceError::Dtype { key, dtype, device: self.choice.to_string(), available })
    }
}

/// The formats as this workspace, Burn and recipes name them.
const DTYPES: [(FloatDtype, DType, Dtype); 3] = [
    (FloatDtype::F32, DType::F32, Dtype::F32),
    (FloatDtype::Bf16, DType::BF16, Dtype::Bf16),
    (FloatDtype::F16, DType::F16, Dtype::F16),
];

/// Those that a device has.
fn formats(device: &Device) -> Vec<FloatDtype> {
    DTYPES.iter().filter(|names| device.supports_dtype(names.1)).map(|names| names.0).collect()
}

fn has(device: &Device, dtype: FloatDtype) -> bool {
    formats(device).contains(&dtype)
}

/// `None` for `auto`.
fn explicit(dtype: Dtype) -> Option<FloatDtype> {
    DTYPES.iter().find(|names| names.2 == dtype).map(|names| names.0)
}

/// The word that recipes have for a format.
pub(crate) fn recipe_dtype(dtype: FloatDtype) -> Dtype {
    DTYPES.iter().find(|names| names.0 == dtype).map_or(Dtype::Auto, |names| names.2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(feature = "flex")]
    fn auto_is_flex_where_there_is_no_gpu() {
        let chosen = choose(&DeviceChoice::Auto).unwrap();
        if chosen.hardware.is_gpu() {
            return assert!(matches!(chosen.choice, DeviceChoice::Cuda(_) | DeviceChoice::Wgpu(_)));
        }
        assert_eq!((&chosen.choice, chosen.hardware), (&DeviceChoice::Flex, Hardware::Cpu));
        assert!(!chosen.device.is_autodiff());
        assert_eq!(chosen.compute_dtype(Dtype::Auto), Ok(FloatDtype::F32));
        assert_eq!(chosen.weight_dtype(Dtype::Auto), Ok(None));
        assert_eq!(chosen.weight_dtype(Dtype::Bf16), Ok(Some(FloatDtype::Bf16)));
        let reason = chosen.reason.unwrap();
        assert!(reason.starts_with("cuda ") && reason.contains("wgpu ") && reason.contains("flex has "), "{reason}");
    }

    #[test]
    #[cfg(feature = "flex")]
    fn a_named_device_needs_no_reason() {
        assert_eq!(choose(&DeviceChoice::Flex).unwrap().reason, None);
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_backend_that_is_not_compiled_in_says_how_to_get_it() {
        let error = choose(&DeviceChoice::Cuda(Some(0))).unwrap_err().to_string();
        assert!(error.contains("cargo build --release --features cuda"), "{error}");
    }

    #[test]
    #[cfg(feature = "wgpu")]
    fn a_device_beyond_those_found_says_how_many_there_are() {
        let error = choose(&DeviceChoice::Wgpu(Some(99))).unwrap_err().to_string();
        assert!(error.contains("device `wgpu:99` does not exist") || error.contains("mesa-vulkan-drivers"), "{error}");
    }

    #[test]
    #[cfg(feature = "ndarray")]
    fn half_precision_on_ndarray_is_refused_before_anything_is_loaded() {
        let chosen = choose(&DeviceChoice::NdArray).unwrap();
        let error = chosen.compute_dtype(Dtype::F16).unwrap_err().to_string();
        assert!(error.contains("`model.compute_dtype: f16` is not possible on `ndarray`, which has f32;"), "{error}");
        assert!(chosen.weight_dtype(Dtype::Bf16).is_err());
        assert_eq!(chosen.weight_dtype(Dtype::Auto), Ok(Some(FloatDtype::F32)));
    }

    #[test]
    fn every_backend_of_this_build_is_listed_and_no_other() {
        let found = found();
        for backend in [Backend::Flex, Backend::NdArray] {
            assert_eq!(found.iter().any(|device| device.backend == backend), backend.is_compiled_in(), "{backend}");
        }
        for device in &found {
            assert!(device.backend.is_compiled_in() && !device.name.is_empty(), "{device:?}");
            assert!(device.dtypes.contains(&FloatDtype::F32), "{device:?}");
            assert_eq!(choose(&device.choice).unwrap().choice, device.choice);
        }
    }
}
