//! Every operation forward and backward against `fixtures/make_kernels.py`.

use std::collections::BTreeMap;
use std::fs;

use burn::tensor::{Device, Int, Tensor, TensorData};
use emberlora::kernels::checkpoint::Values;
use emberlora::kernels::{
    AdamWStep, AdapterPath, AttentionKind, AttentionOptions, Dropout, FrozenWeight, Gate, HeadLayout, HeadNorms, Input,
    PackedTensor, Projection, ProjectionAdapter, adamw, attention, frozen_linear, glu, linear_cross_entropy,
    lora_linear, project, qkv_attention, rms_norm, rope, sum_squares, undo_adamw,
};
use emberlora::quant::{BlockSize, Codebook, FloatDtype, Scheme, pack};
use safetensors::{Dtype, SafeTensors};

use crate::backends::{Drift, Tested};
use crate::parity::{fixtures, largest, largest_difference};

const SCALE: f32 = 0.7;
const ATTENTION_SCALE: f32 = 0.35;

/// Tensors by `<case>/<tensor>`, with what a device makes of them.
struct Goldens {
    floats: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    integers: BTreeMap<String, (Vec<usize>, Vec<i64>)>,
}

/// One case on one device.
struct Case<'a> {
    goldens: &'a Goldens,
    name: &'static str,
    device: Device,
    allowed: f64,
    drift: &'a mut Drift,
}

impl Goldens {
    fn load() -> Self {
        let bytes = fs::read(fixtures().join("kernels.safetensors")).unwrap();
        let (mut floats, mut integers) = (BTreeMap::new(), BTreeMap::new());
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let shape = view.shape().to_vec();
            match view.dtype() {
                Dtype::F32 => {
                    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                    floats.insert(name.to_owned(), (shape, values.collect()));
                }
                Dtype::I64 => {
                    let values = view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()));
                    integers.insert(name.to_owned(), (shape, values.collect()));
                }
                other => panic!("{name} is {other:?}"),
            }
        }
        Self { floats, integers }
    }
}

impl Case<'_> {
    fn golden(&self, name: &str) -> &(Vec<usize>, Vec<f32>) {
        let name = format!("{}/{name}", self.name);
        self.goldens.floats.get(&name).unwrap_or_else(|| panic!("there is no {name}"))
    }

    /// A constant, outside of autodiff.
    fn constant<const D: usize>(&self, name: &str) -> Tensor<D> {
        let (shape, values) = self.golden(name).clone();
        Tensor::from_data(TensorData::new(values, shape), &self.device.clone().without_autodiff())
    }

    /// An input that a gradient is asked for.
    fn leaf<const D: usize>(&self, name: &str) -> Tensor<D> {
        let (shape, values) = self.golden(name).clone();
        Tensor::from_data(TensorData::new(values, shape), &self.device).require_grad()
    }

    fn integers<const D: usize>(&self, name: &str) -> Tensor<D, Int> {
        let (shape, values) = self.goldens.integers[&format!("{}/{name}", self.name)].clone();
        Tensor::from_data(TensorData::new(values, shape), &self.device.clone().without_autodiff())
    }

    fn compare<const D: usize>(&mut self, name: &str, found: Tensor<D>) {
        let (shape, expected) = self.golden(name).clone();
        assert_eq!(found.dims().to_vec(), shape, "{}/{name}", self.name);
        let found: Vec<f32> = found.into_data().convert::<f32>().try_to_vec().unwrap();
        let difference = largest_difference(&found, &expected) / largest(&expected).max(1e-6);
        let label = format!("{}/{name}", self.name);
        self.drift.note(self.name, &label, difference, self.allowed);
    }

    /// Compares the result and the gradient of every leaf of sum(y cos y).
    fn check<const D: usize, const L: usize>(&mut self, y: Tensor<D>, leaves: &[(&str, &Tensor<L>)]) {
        let grads = (y.clone() * y.clone().cos()).sum().backward();
        self.compare("y", y.inner());
        for (name, leaf) in leaves {
            let grad = leaf.grad(&grads).unwrap_or_else(|| panic!("{}: {name} has no gradient", self.name));
            self.compare(&format!("d{name}"), grad);
        }
    }
}

pub fn operations_and_their_gradients_are_those_of_pytorch(tested: &Tested) {
    let (goldens, tolerance) = (Goldens::load(), tested.tolerance(FloatDtype::F32));
    let mut drift = Drift::default();
    let plain = tested.device.clone().autodiff();
    for device in [plain.clone(), plain.gradient_checkpointing()] {
        let mut run = |name: &'static str, f: &dyn Fn(&mut Case<'_>)| {
            let (device, drift) = (device.clone(), &mut drift);
            f(&mut Case { goldens: &goldens, name, device, allowed: tolerance.operation, drift });
        };
        run("rms_norm", &|case| {
            let x = case.leaf::<3>("x");
            case.check(rms_norm(x.clone(), case.constant("w"), 1e-5), &[("x", &x)]);
        });
        for (name, kind) in [("glu_silu", Gate::Silu), ("glu_gelu", Gate::Gelu), ("glu_gelu_tanh", Gate::GeluTanh)] {
            run(name, &|case| {
                let (gate, up) = (case.leaf::<3>("gate"), case.leaf::<3>("up"));
                case.check(glu(gate.clone(), up.clone(), kind), &[("gate", &gate), ("up", &up)]);
            });
        }
        for name in ["rope", "rope_partial"] {
            run(name, &|case| {
                let x = case.leaf::<4>("x");
                case.check(rope(x.clone(), case.constant("cos"), case.constant("sin")), &[("x", &x)]);
            });
        }
        for (name, window) in [("attention", None), ("attention_tree_window", Some(3)), ("attention_cached", None)] {
            for kind in [AttentionKind::Fused, AttentionKind::Eager] {
                run(name, &|case| {
                    let [q, k, v] = ["q", "k", "v"].map(|name| case.leaf::<4>(name));
                    let options = AttentionOptions::new(ATTENTION_SCALE, window, kind);
                    let y = attention(q.clone(), k.clone(), v.clone(), case.integers("spans"), options);
                    case.check(y, &[("q", &q), ("k", &k), ("v", &v)]);
                });
            }
        }
        for (name, normed) in [("qkv", false), ("qkv_head_norms", true), ("qkv_wide_norms", true)] {
            run(name, &|case| {
                let qkv = case.leaf::<3>("qkv");
                let norms =
                    normed.then(|| HeadNorms { q: case.constant("q_norm"), k: case.constant("k_norm"), eps: 1e-5 });
                let y = qkv_attention(
                    qkv.clone(),
                    norms.as_ref(),
                    (case.constant("cos"), case.constant("sin")),
                    case.integers("spans"),
                    HeadLayout::new(4, 2, 8),
                    AttentionOptions::new(ATTENTION_SCALE, None, AttentionKind::Fused),
                );
                case.check(y, &[("qkv", &qkv)]);
            });
        }
        for (name, dropout) in [("lora", None), ("lora_dropout", Some(Dropout::new(0.3, 11)))] {
            run(name, &|case| {
                let (x, a, b) = (case.leaf::<3>("x"), case.leaf::<2>("a"), case.leaf::<2>("b"));
                let y = lora_linear(x.clone(), case.constant::<2>("w"), a.clone(), b.clone(), SCALE, dropout);
                check_linear(case, y, &[("x", &x)], &[("a", &a), ("b", &b)]);
            });
        }
        run("frozen", &|case| {
            let x = case.leaf::<3>("x");
            case.check(frozen_linear(x.clone(), case.constant::<2>("w")), &[("x", &x)]);
        });
        run("normed_group", &normed_group);
        run("gated", &|case| {
            let (x, a, b) = (case.leaf::<3>("x"), case.leaf::<2>("a"), case.leaf::<2>("b"));
            let adapter = ProjectionAdapter { a: a.clone(), b: b.clone(), path: AdapterPath::new(SCALE, None) };
            let projection = projection(case.constant("w"), None, Some(adapter));
            let y = project(x.clone(), Input::Gated(Gate::Silu), &[projection], None, Values::Read);
            check_linear(case, y, &[("x", &x)], &[("a", &a), ("b", &b)]);
        });
        run("linear_cross_entropy", &|case| {
            let hidden = case.leaf::<2>("hidden");
            let (head, weights) = (case.constant::<2>("head"), case.constant("weights"));
            let loss = linear_cross_entropy(hidden.clone(), head, case.integers("targets"), weights);
            let grads = loss.clone().backward();
            case.compare("y", loss.inner());
            case.compare("dhidden", hidden.grad(&grads).unwrap());
        });
        run("lora", &packed_weights);
        run("adamw", &optimizer);
    }
    drift.check("operations", tolerance);
}

/// Query, key and value of a normed input; the second has no adapter.
fn normed_group(case: &mut Case<'_>) {
    let (x, residual) = (case.leaf::<3>("x"), case.leaf::<3>("residual"));
    let factors = ["a0", "b0", "a2", "b2"].map(|name| (name, case.leaf::<2>(name)));
    let [(_, a0), (_, b0), (_, a2), (_, b2)] = factors.clone();
    let adapter = |a, b| Some(ProjectionAdapter { a, b, path: AdapterPath::new(SCALE, None) });
    let group = [(0, adapter(a0, b0)), (1, None), (2, adapter(a2, b2))].map(|(i, adapter)| {
        projection(case.constant(&format!("w{i}")), Some(case.constant(&format!("bias{i}"))), adapter)
    });
    let input = Input::Normed { weight: case.constant("norm"), eps: 1e-5 };
    let y = project(x.clone(), input, &group, Some(residual.clone()), Values::Read);
    let factors: Vec<(&str, &Tensor<2>)> = factors.iter().map(|(name, factor)| (*name, factor)).collect();
    check_linear(case, y, &[("x", &x), ("residual", &residual)], &factors);
}

/// Packed weights unpack to what the host unpacks them to, and a product with one is that with the unpacked weight.
fn packed_weights(case: &mut Case<'_>) {
    let (shape, values) = case.golden("w").clone();
    let shape = [shape[0], shape[1]];
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let four_bit =
        |codebook, double_quant| Scheme::FourBit { codebook, block_size: BlockSize::default(), double_quant };
    for (name, scheme) in [
        ("NF4", four_bit(Codebook::Nf4, false)),
        ("NF4, double quantisation", four_bit(Codebook::Nf4, true)),
        ("FP4", four_bit(Codebook::Fp4, false)),
        ("INT8", Scheme::Int8),
    ] {
        let packed = pack("w", shape, FloatDtype::F32, &bytes, scheme).unwrap();
        let mut host = vec![0f32; values.len()];
        packed.dequantise(0, &mut host);
        let plain = case.device.clone().without_autodiff();
        let dense = Tensor::<2>::from_data(TensorData::new(host.clone(), shape), &plain);
        let packed = FrozenWeight::from(PackedTensor::upload(&packed, 0.0, &case.device));
        let unpacked = packed.dequantise().into_data().try_to_vec::<f32>().unwrap();
        let [expected, found] = [dense.into(), packed].map(|weight| product(case, weight));
        let products = ["y", "dx", "dA", "dB"].into_iter().zip(expected.into_iter().zip(found));
        for (tensor, (expected, found)) in [("weight", (host, unpacked))].into_iter().chain(products) {
            let difference = largest_difference(&found, &expected) / largest(&expected);
            case.drift.note(name, tensor, difference, case.allowed);
        }
    }
}

/// y, dx, dA and dB of the case's adapted product with `weight`.
fn product(case: &Case<'_>, weight: FrozenWeight) -> [Vec<f32>; 4] {
    let (x, a, b) = (case.leaf::<3>("x"), case.leaf::<2>("a"), case.leaf::<2>("b"));
    let y = lora_linear(x.clone(), weight, a.clone(), b.clone(), SCALE, None);
    let grads = (y.clone() * y.clone().cos()).sum().backward();
    let [da, db] = [a, b].map(|factor| factor.grad(&grads).unwrap().into_data());
    [y.inner().into_data(), x.grad(&grads).unwrap().into_data(), da, db].map(|data| data.try_to_vec().unwrap())
}

fn check_linear(case: &mut Case<'_>, y: Tensor<3>, inputs: &[(&str, &Tensor<3>)], factors: &[(&str, &Tensor<2>)]) {
    let grads = (y.clone() * y.clone().cos()).sum().backward();
    case.compare("y", y.inner());
    for (name, leaf) in inputs {
        case.compare(&format!("d{name}"), leaf.grad(&grads).unwrap());
    }
    for (name, leaf) in factors {
        case.compare(&format!("d{name}"), leaf.grad(&grads).unwrap());
    }
}

fn projection(weight: Tensor<2>, bias: Option<Tensor<1>>, adapter: Option<ProjectionAdapter>) -> Projection {
    Projection { weight: weight.into(), bias, adapter }
}

/// Three clipped updates, the way back from the last, and the norm.
fn optimizer(case: &mut Case<'_>) {
    let device = case.device.clone().without_autodiff();
    let zeros = || Tensor::<2>::zeros([6, 5], &device);
    let (mut p, mut moments) = (case.constant::<2>("p0"), [zeros(), zeros()]);
    for (update, factor) in [(1, 1f32), (2, 0.25), (3, 0.5)] {
        let step = AdamWStep { learning_rate: 0.1, betas: [0.9, 0.99], eps: 1e-3, weight_decay: 0.2, update };
        let (grad, before) = (case.constant(&format!("g{update}")), format!("p{}", update - 1));
        (p, moments) = adamw(p, grad, moments, Tensor::from_floats([factor], &device), step);
        case.compare(&format!("p{update}"), p.clone());
        case.compare(&before, undo_adamw(p.clone(), moments.clone(), step));
    }
    case.compare("squares", sum_squares(case.constant::<2>("g1")));
}
