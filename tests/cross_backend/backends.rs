//! The backends of this build, and how far each may be from the numbers that PyTorch has.

use std::fmt::Write as _;

use burn::tensor::Device;
use emberlora::config::{DeviceChoice, Dtype};
use emberlora::quant::FloatDtype;
use emberlora::train::device;

/// How far a backend may be from the expected numbers when it computes in a format.
pub struct Tolerance {
    pub backend: &'static str,
    pub compute: FloatDtype,
    /// One operation or its gradient, beside the largest element.
    pub operation: f64,
    /// The gradient of a whole model, beside the largest element of a tensor.
    pub gradient: f64,
    /// The loss of each of ten steps, in nats.
    pub loss: f64,
    /// The gradient norm of each of ten steps, beside itself.
    pub norm: f64,
    /// An element of an A or B after each of ten steps, in which Adam moves it by up to about 0.003 each.
    pub factors: f64,
    pub reason: &'static str,
}

pub const TOLERANCES: [Tolerance; 6] = [
    Tolerance {
        backend: "flex",
        compute: FloatDtype::F32,
        operation: 3e-6,
        gradient: 1e-5,
        loss: 1e-4,
        norm: 1e-3,
        factors: 1e-4,
        reason: "f32 sums in another order than PyTorch's; exp and tanh to two units in the last place",
    },
    Tolerance {
        backend: "ndarray",
        compute: FloatDtype::F32,
        operation: 3e-6,
        gradient: 1e-5,
        loss: 1e-4,
        norm: 1e-3,
        factors: 1e-4,
        reason: "f32 sums in another order than PyTorch's",
    },
    Tolerance {
        backend: "wgpu",
        compute: FloatDtype::F32,
        operation: 1e-5,
        gradient: 3e-5,
        loss: 1e-4,
        norm: 1e-3,
        factors: 1e-4,
        reason: "as on a CPU, and WGSL allows exp, sin, cos and division an error of several units in the last place",
    },
    Tolerance {
        backend: "cuda",
        compute: FloatDtype::F32,
        operation: 2e-3,
        gradient: 5e-3,
        loss: 5e-3,
        norm: 1e-2,
        factors: 2e-2,
        reason: "tensor cores may round the factors of a product to TF32, 10 bits of mantissa",
    },
    Tolerance {
        backend: "flex",
        compute: FloatDtype::Bf16,
        operation: 2e-2,
        gradient: 5e-2,
        loss: 3e-2,
        norm: 5e-2,
        factors: 5e-2,
        reason: "activations are rounded to 8 bits of mantissa, 4e-3, after every operation",
    },
    Tolerance {
        backend: "cuda",
        compute: FloatDtype::Bf16,
        operation: 2e-2,
        gradient: 5e-2,
        loss: 3e-2,
        norm: 5e-2,
        factors: 5e-2,
        reason: "activations are rounded to 8 bits of mantissa, 4e-3, after every operation",
    },
];

/// A backend under test.
pub struct Tested {
    pub name: &'static str,
    /// Without autodiff.
    pub device: Device,
    /// The format of weights that `model.dtype: auto` means here.
    pub weights: Option<FloatDtype>,
}

impl Tested {
    pub fn flex() -> Self {
        Self::new("flex", DeviceChoice::Flex)
    }

    pub fn ndarray() -> Self {
        Self::new("ndarray", DeviceChoice::NdArray)
    }

    /// The first adapter, whatever it is: Mesa's software Vulkan on a machine without a GPU. There must be one.
    pub fn wgpu() -> Self {
        Self::new("wgpu", DeviceChoice::Wgpu(Some(0)))
    }

    pub fn cuda() -> Self {
        Self::new("cuda", DeviceChoice::Cuda(Some(0)))
    }

    fn new(name: &'static str, choice: DeviceChoice) -> Self {
        let chosen = device::choose(&choice).unwrap_or_else(|error| panic!("{error}"));
        Self { name, weights: chosen.weight_dtype(Dtype::Auto).unwrap(), device: chosen.device }
    }

    /// Every backend of this build.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        let known: [(bool, fn() -> Self); 4] = [
            (cfg!(feature = "flex"), Self::flex),
            (cfg!(feature = "ndarray"), Self::ndarray),
            (cfg!(feature = "wgpu"), Self::wgpu),
            (cfg!(feature = "cuda"), Self::cuda),
        ];
        all.extend(known.into_iter().filter(|(compiled_in, _)| *compiled_in).map(|(_, open)| open()));
        all
    }

    /// The formats that the table has a row for and the device can compute in.
    pub fn tolerances(&self) -> impl Iterator<Item = &'static Tolerance> {
        let has = |compute| self.device.supports_dtype(dtype(compute));
        TOLERANCES.iter().filter(move |row| row.backend == self.name && has(row.compute))
    }

    pub fn tolerance(&self, compute: FloatDtype) -> &'static Tolerance {
        let row = self.tolerances().find(|row| row.compute == compute);
        row.unwrap_or_else(|| panic!("the table has no row for {} in {compute}", self.name))
    }
}

fn dtype(compute: FloatDtype) -> burn::tensor::DType {
    match compute {
        FloatDtype::F32 => burn::tensor::DType::F32,
        FloatDtype::Bf16 => burn::tensor::DType::BF16,
        FloatDtype::F16 => burn::tensor::DType::F16,
    }
}

/// What is off, in the order in which it was found.
#[derive(Default)]
pub struct Drift {
    rows: Vec<(String, String, f64, f64)>,
    most: f64,
}

impl Drift {
    /// Notes `difference` of `tensor` where it is more than allowed.
    pub fn note(&mut self, step: impl ToString, tensor: &str, difference: f64, allowed: f64) {
        self.most = self.most.max(difference / allowed);
        // What is not a number is not within anything.
        if !matches!(difference.partial_cmp(&allowed), Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)) {
            self.rows.push((step.to_string(), tensor.to_owned(), difference, allowed));
        }
    }

    /// Panics with a table of what is off at the first step where anything is; says how close it was otherwise.
    #[track_caller]
    pub fn check(self, context: &str, tolerance: &Tolerance) {
        let Tolerance { backend, compute, reason, .. } = tolerance;
        println!("{backend} in {compute}, {context}: at most {:.0} % of what is allowed", 100.0 * self.most);
        let Some((first, ..)) = self.rows.first() else { return };
        let mut table = format!("{backend} in {compute} drifts in {context} (allowed: {reason})\n");
        let _ = writeln!(table, "{:<16} {:>12} {:>12}  tensor", "at", "difference", "allowed");
        for (step, tensor, difference, allowed) in self.rows.iter().take_while(|row| row.0 == *first) {
            let _ = writeln!(table, "{step:<16} {difference:>12.3e} {allowed:>12.3e}  {tensor}");
        }
        panic!("{table}");
    }
}
