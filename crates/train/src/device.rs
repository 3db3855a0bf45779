//! Where tensors live, and in which formats a device can hold them.

use burn::tensor::{DType, Device};
use emberlora_config::{DeviceChoice, Dtype};
use emberlora_quant::FloatDtype;

/// The backends that this build can have, the one that `auto` prefers first.
const KNOWN: [(&str, bool); 4] = [
    ("flex", cfg!(feature = "flex")),
    ("cuda", cfg!(feature = "cuda")),
    ("wgpu", cfg!(feature = "wgpu")),
    ("ndarray", cfg!(feature = "ndarray")),
];

/// Why a device or a format cannot be had.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The backend was left out when this program was compiled.
    #[error(
        "device `{name}` is not compiled in (this build has: {}); get it with `cargo build --release --features {name}`",
        available.join(", ")
    )]
    NotCompiledIn {
        /// The backend.
        name: &'static str,
        /// What can be chosen instead.
        available: Vec<&'static str>,
    },
    /// No backend at all was compiled in.
    #[error("no device is compiled in; get one with `cargo build --release --features flex`")]
    NoneCompiledIn,
    /// There are fewer devices of this kind than the recipe counts.
    #[error("device `{name}:{index}` does not exist: {found} found, counted from 0")]
    NoSuchDevice {
        /// The backend.
        name: &'static str,
        /// The index that was asked for.
        index: usize,
        /// How many devices there are.
        found: usize,
    },
    /// The device cannot compute in, or hold, a format.
    #[error("`{key}: {dtype}` is not possible on `{device}`; set `{key}: f32`")]
    Dtype {
        /// The key of the recipe.
        key: &'static str,
        /// The format.
        dtype: FloatDtype,
        /// The device, as recipes name it.
        device: String,
    },
}

/// A device and the choice that leads to it, with nothing left open.
#[derive(Clone, Debug)]
pub struct ChosenDevice {
    /// The device, without autodiff.
    pub device: Device,
    /// What to write in a recipe to get the same one; never [`DeviceChoice::Auto`].
    pub choice: DeviceChoice,
}

/// Opens the device that a recipe asks for. `auto` is flex if it is compiled in, else whatever is.
///
/// # Errors
/// When the backend is not compiled in, or there are not that many devices.
pub fn choose(choice: &DeviceChoice) -> Result<ChosenDevice, DeviceError> {
    let choice = match *choice {
        DeviceChoice::Auto => preferred()?,
        other => other,
    };
    let device = match choice {
        DeviceChoice::Auto => return Err(DeviceError::NoneCompiledIn),
        DeviceChoice::Flex => flex()?,
        DeviceChoice::NdArray => ndarray()?,
        DeviceChoice::Wgpu(index) => wgpu(index)?,
        DeviceChoice::Cuda(index) => cuda(index)?,
    };
    Ok(ChosenDevice { device, choice })
}

/// The name of a choice, as recipes write it.
pub fn name(choice: &DeviceChoice) -> String {
    let indexed = |name: &str, index: &Option<usize>| index.map_or(name.to_owned(), |index| format!("{name}:{index}"));
    match choice {
        DeviceChoice::Auto => "auto".to_owned(),
        DeviceChoice::Flex => "flex".to_owned(),
        DeviceChoice::NdArray => "ndarray".to_owned(),
        DeviceChoice::Wgpu(index) => indexed("wgpu", index),
        DeviceChoice::Cuda(index) => indexed("cuda", index),
    }
}

impl ChosenDevice {
    /// The format of activations: what the recipe says, or f32 for `auto`; on CUDA `auto` is bf16 where the GPU has it.
    ///
    /// # Errors
    /// When the device cannot compute in it.
    pub fn compute_dtype(&self, dtype: Dtype) -> Result<FloatDtype, DeviceError> {
        match (explicit(dtype), self.choice) {
            (Some(dtype), _) => self.supported("model.compute_dtype", dtype),
            (None, DeviceChoice::Cuda(_)) if self.device.supports_dtype(DType::BF16) => Ok(FloatDtype::Bf16),
            (None, _) => Ok(FloatDtype::F32),
        }
    }

    /// The format in which frozen weights are kept; `None` keeps the files' own. A device that cannot hold half
    /// precision keeps f32 for `auto`.
    ///
    /// # Errors
    /// When the device cannot hold the one that the recipe names.
    pub fn weight_dtype(&self, dtype: Dtype) -> Result<Option<FloatDtype>, DeviceError> {
        match explicit(dtype) {
            Some(dtype) => self.supported("model.dtype", dtype).map(Some),
            None if self.choice == DeviceChoice::NdArray => Ok(Some(FloatDtype::F32)),
            None => Ok(None),
        }
    }

    fn supported(&self, key: &'static str, dtype: FloatDtype) -> Result<FloatDtype, DeviceError> {
        if DTYPES.iter().any(|&(ours, burn, _)| ours == dtype && self.device.supports_dtype(burn)) {
            return Ok(dtype);
        }
        Err(DeviceError::Dtype { key, dtype, device: name(&self.choice) })
    }
}

/// The formats as this workspace, Burn and recipes name them.
const DTYPES: [(FloatDtype, DType, Dtype); 3] = [
    (FloatDtype::F32, DType::F32, Dtype::F32),
    (FloatDtype::Bf16, DType::BF16, Dtype::Bf16),
    (FloatDtype::F16, DType::F16, Dtype::F16),
];

/// `None` for `auto`.
fn explicit(dtype: Dtype) -> Option<FloatDtype> {
    DTYPES.iter().find(|names| names.2 == dtype).map(|names| names.0)
}

/// The word that recipes have for a format.
pub(crate) fn recipe_dtype(dtype: FloatDtype) -> Dtype {
    DTYPES.iter().find(|names| names.0 == dtype).map_or(Dtype::Auto, |names| names.2)
}

fn preferred() -> Result<DeviceChoice, DeviceError> {
    match available().first() {
        Some(&"flex") => Ok(DeviceChoice::Flex),
        Some(&"cuda") => Ok(DeviceChoice::Cuda(None)),
        Some(&"wgpu") => Ok(DeviceChoice::Wgpu(None)),
        Some(_) => Ok(DeviceChoice::NdArray),
        None => Err(DeviceError::NoneCompiledIn),
    }
}

fn available() -> Vec<&'static str> {
    KNOWN.iter().filter(|(_, compiled)| *compiled).map(|(name, _)| *name).collect()
}

#[allow(dead_code, reason = "not called when every backend is compiled in")]
fn missing(name: &'static str) -> DeviceError {
    DeviceError::NotCompiledIn { name, available: available() }
}

#[cfg(feature = "flex")]
fn flex() -> Result<Device, DeviceError> {
    Ok(Device::flex())
}

#[cfg(not(feature = "flex"))]
fn flex() -> Result<Device, DeviceError> {
    Err(missing("flex"))
}

#[cfg(feature = "ndarray")]
#[expect(deprecated, reason = "Burn plans to remove it; it stays as an independent reference until then")]
fn ndarray() -> Result<Device, DeviceError> {
    Ok(Device::ndarray())
}

#[cfg(not(feature = "ndarray"))]
fn ndarray() -> Result<Device, DeviceError> {
    Err(missing("ndarray"))
}

#[cfg(feature = "wgpu")]
fn wgpu(index: Option<usize>) -> Result<Device, DeviceError> {
    match index {
        None => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        Some(index) => nth("wgpu", burn::tensor::DeviceType::Wgpu, index),
    }
}

#[cfg(not(feature = "wgpu"))]
fn wgpu(_: Option<usize>) -> Result<Device, DeviceError> {
    Err(missing("wgpu"))
}

#[cfg(feature = "cuda")]
fn cuda(index: Option<usize>) -> Result<Device, DeviceError> {
    nth("cuda", burn::tensor::DeviceType::Cuda, index.unwrap_or(0))
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: Option<usize>) -> Result<Device, DeviceError> {
    Err(missing("cuda"))
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn nth(name: &'static str, kind: burn::tensor::DeviceType, index: usize) -> Result<Device, DeviceError> {
    let devices = Device::enumerate(kind).into_vec();
    let found = devices.len();
    devices.into_iter().nth(index).ok_or(DeviceError::NoSuchDevice { name, index, found })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(feature = "flex")]
    fn auto_is_flex_where_it_is_compiled_in() {
        let chosen = choose(&DeviceChoice::Auto).unwrap();
        assert_eq!(chosen.choice, DeviceChoice::Flex);
        assert!(!chosen.device.is_autodiff());
        assert_eq!(chosen.compute_dtype(Dtype::Auto), Ok(FloatDtype::F32));
        assert_eq!(chosen.weight_dtype(Dtype::Auto), Ok(None));
        assert_eq!(chosen.weight_dtype(Dtype::Bf16), Ok(Some(FloatDtype::Bf16)));
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_backend_that_is_not_compiled_in_says_how_to_get_it() {
        let error = choose(&DeviceChoice::Cuda(Some(0))).unwrap_err().to_string();
        assert!(error.contains("cargo build --release --features cuda"), "{error}");
    }

    #[test]
    #[cfg(feature = "ndarray")]
    fn half_precision_on_ndarray_is_refused_before_anything_is_loaded() {
        let chosen = choose(&DeviceChoice::NdArray).unwrap();
        let error = chosen.compute_dtype(Dtype::F16).unwrap_err().to_string();
        assert!(error.contains("model.compute_dtype: f16"), "{error}");
        assert!(chosen.weight_dtype(Dtype::Bf16).is_err());
        assert_eq!(chosen.weight_dtype(Dtype::Auto), Ok(Some(FloatDtype::F32)));
    }

    #[test]
    fn names_are_those_of_recipes() {
        assert_eq!(name(&DeviceChoice::Wgpu(Some(1))), "wgpu:1");
        assert_eq!(name(&DeviceChoice::Cuda(None)), "cuda");
    }
}
