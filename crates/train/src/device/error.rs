//! Why a device or a format cannot be had.

use emberlora_config::DeviceChoice;
use emberlora_quant::FloatDtype;

use super::Backend;
use crate::remote::RemoteError;

/// Why a device or a format cannot be had.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The backend was left out when this program was compiled.
    #[error(
        "device `{backend}` is not compiled in (this build has: {}); get it with `cargo build --release --features {backend}`",
        names(available)
    )]
    NotCompiledIn {
        /// The backend.
        backend: Backend,
        /// What can be chosen instead.
        available: Vec<Backend>,
    },
    /// The backend is compiled in, but the machine has no device for it.
    #[error("device `{backend}`: no device was found; {}", backend.needs())]
    NoDevice {
        /// The backend.
        backend: Backend,
    },
    /// There are fewer devices of this kind than the recipe counts.
    #[error(
        "device `{backend}:{index}` does not exist: {found} found, counted from 0; `emberlora devices` lists what there is"
    )]
    NoSuchDevice {
        /// The backend.
        backend: Backend,
        /// The index that was asked for.
        index: usize,
        /// How many devices there are.
        found: usize,
    },
    /// Nothing that `auto` may take is there.
    #[error(
        "`device: auto` finds nothing that it takes: {}; name one that `emberlora devices` lists, or build with \
         `--features flex`",
        passed.join(", ")
    )]
    NothingForAuto {
        /// What was looked at, and what is wrong with it.
        passed: Vec<String>,
    },
    /// The device cannot compute in, or hold, a format.
    #[error(
        "`{key}: {dtype}` is not possible on `{device}`, which has {}; set `{key}` to what it has or to auto",
        available.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(", ")
    )]
    Dtype {
        /// The key of the recipe.
        key: &'static str,
        /// The format.
        dtype: FloatDtype,
        /// The device, as recipes name it.
        device: String,
        /// The formats that the device has.
        available: Vec<FloatDtype>,
    },
    /// The device of a server is not to be had.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// Two entries of the recipe's list lead to one device.
    #[error("`device` names `{first}` twice, the second time as `{second}`; a device cannot share with itself")]
    Twice {
        /// The first name.
        first: DeviceChoice,
        /// The second one.
        second: DeviceChoice,
    },
}

fn names(backends: &[Backend]) -> String {
    match backends {
        [] => "none".to_owned(),
        backends => backends.iter().map(|backend| backend.name()).collect::<Vec<_>>().join(", "),
    }
}
