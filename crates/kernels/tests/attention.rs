//! Fused attention against the eager one, and both against the definition.

mod support;

use burn::tensor::{Device, Int, Tensor};
use emberlora_kernels::{AttentionKind, AttentionOptions, attention};
use proptest::prelude::*;
use support::forest::Forest;
use support::*;

struct Case {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    /// One row of the batch each.
    forests: Vec<Forest>,
    window: Option<usize>,
}

/// `[batch, queries, 6, 8]` against `[batch, keys, 2, 8]`.
fn case(device: &Device, queries: usize, forests: &[Forest], window: Option<usize>) -> Case {
    device.seed(3);
    let (batch, keys, heads, kv_heads, dim) = (forests.len(), forests[0].len(), 6, 2, 8);
    Case {
        q: normal([batch, queries, heads, dim], 1.0, device),
        k: normal([batch, keys, kv_heads, dim], 1.0, device),
        v: normal([batch, keys, kv_heads, dim], 1.0, device),
        forests: forests.to_vec(),
        window,
    }
}

fn spans(forests: &[Forest], device: &Device) -> Tensor<3, Int> {
    let values: Vec<i64> = forests.iter().flat_map(Forest::spans).collect();
    ints(&values, [forests.len(), forests[0].len(), 2], device)
}

type Results = (Tensor<4>, Tensor<4>, Tensor<4>, Tensor<4>);

/// O, dQ, dK, dV.
fn differentiate(case: &Case, kind: AttentionKind) -> Results {
    let (q, k, v) = (leaf(&case.q), leaf(&case.k), leaf(&case.v));
    let options = AttentionOptions::new(0.35, case.window, kind);
    let out = attention(q.clone(), k.clone(), v.clone(), spans(&case.forests, &q.device()), options);
    let grads = probe(out.clone()).backward();
    (out, q.grad(&grads).unwrap(), k.grad(&grads).unwrap(), v.grad(&grads).unwrap())
}

/// The definition, in f64, one query at a time.
fn by_definition(case: &Case) -> Vec<f32> {
    let ([batch, queries, heads, dim], [_, keys, kv_heads, _]) = (case.q.dims(), case.k.dims());
    let (q, k, v) = (values(&case.q), values(&case.k), values(&case.v));
    let mut out = vec![0f32; q.len()];
    for b in 0..batch {
        for i in 0..queries {
            let seen = case.forests[b].seen(i + keys - queries, case.window);
            for h in 0..heads {
                let kv = h / (heads / kv_heads);
                let query = &q[((b * queries + i) * heads + h) * dim..][..dim];
                let at = |j: usize| ((b * keys + j) * kv_heads + kv) * dim;
                let weight = |&j: &usize| {
                    let dot: f64 = query.iter().zip(&k[at(j)..][..dim]).map(|(a, b)| f64::from(a * b)).sum();
                    (0.35 * dot).exp()
                };
                let weights: Vec<f64> = seen.iter().map(weight).collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..dim {
                    let values = weights.iter().zip(&seen).map(|(w, &j)| w / sum * f64::from(v[at(j) + d]));
                    out[((b * queries + i) * heads + h) * dim + d] = values.sum::<f64>() as f32;
                }
            }
        }
    }
    out
}

fn check_on(device: &Device, queries: usize, forests: &[Forest], window: Option<usize>) {
    let case = case(device, queries, forests, window);
    let (fused, eager) = (differentiate(&case, AttentionKind::Fused), differentiate(&case, AttentionKind::Eager));
    let expected = Tensor::<1>::from_floats(by_definition(&case).as_slice(), device).reshape(case.q.dims());
    assert_near("fused O", &expected, &fused.0, 3e-6);
    assert_near("eager O", &expected, &eager.0, 3e-6);
    assert_near("dQ", &eager.1, &fused.1, 5e-6);
    assert_near("dK", &eager.2, &fused.2, 5e-6);
    assert_near("dV", &eager.3, &fused.3, 5e-6);
}

/// Close beside the largest element or beside 1: where every query sees one key alone, dQ and dK are nothing but rounding.
#[track_caller]
fn assert_near(name: &str, a: &Tensor<4>, b: &Tensor<4>, tolerance: f32) {
    let (a, b) = (values(a), values(b));
    let scale = a.iter().fold(1f32, |most, v| most.max(v.abs()));
    let difference = a.iter().zip(&b).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(a.len() == b.len() && difference <= tolerance * scale, "{name}: off by {difference:.3e} of {scale}");
}

fn check(queries: usize, forests: &[Forest], window: Option<usize>) {
    for device in devices() {
        check_on(&device, queries, forests, window);
    }
}

#[test]
fn one_document_per_row() {
    check(9, &[Forest::chain(9), Forest::chain(9)], None);
}

#[test]
fn packed_documents_and_padding_do_not_see_each_other() {
    check(9, &[Forest::documents(&[3, 4, 2]), Forest::documents(&[1, 6, 1, 1])], None);
}

#[test]
fn branches_see_their_trunk_and_not_each_other() {
    // Two answers behind four shared tokens; three branches, one of which splits again.
    let fork = Forest::from_steps(&[0, 0, 0, 0, 0, 0, 2, 0, 0]);
    let tree = Forest::from_steps(&[0, 0, 0, 1, 0, 1, 0, 3, 0]);
    assert_eq!(fork.seen(7, None), [0, 1, 2, 3, 6, 7]);
    check(9, &[fork, tree], None);
}

#[test]
fn a_sliding_window_goes_back_along_the_path() {
    let forests = [Forest::from_steps(&[0, 0, 0, 0, 2, 0, 0, 5, 0]), Forest::documents(&[3, 6])];
    check(9, &forests, Some(3));
    check(9, &forests, Some(2));
}

#[test]
fn later_queries_see_the_keys_of_a_cache() {
    check(3, &[Forest::chain(10), Forest::chain(10)], None);
    check(1, &[Forest::documents(&[2, 8]), Forest::documents(&[4, 6])], Some(5));
}

#[test]
fn a_window_of_one_key_copies_its_value() {
    let device = Device::flex().autodiff();
    let case = case(&device, 9, &[Forest::chain(9), Forest::chain(9)], Some(1));
    let (out, ..) = differentiate(&case, AttentionKind::Fused);
    let copied = case.v.clone().reshape([2, 9, 2, 1, 8]).expand([2, 9, 2, 3, 8]).reshape([2, 9, 6, 8]);
    assert_close("O", &copied, &out, 1e-6);
}

#[test]
fn heads_may_lie_in_the_rows_of_a_wider_tensor() {
    let device = Device::flex().autodiff();
    let case = case(&device, 9, &[Forest::from_steps(&[0, 0, 0, 1, 0, 1, 0, 3, 0]), Forest::chain(9)], None);
    let joined = Tensor::cat(vec![case.q.clone(), case.k.clone(), case.v.clone()], 2);
    let views = Case {
        q: joined.clone().narrow(2, 0, 6),
        k: joined.clone().narrow(2, 6, 2),
        v: joined.narrow(2, 8, 2),
        ..case
    };
    let run = |q, k, v| {
        let options = AttentionOptions::new(0.35, None, AttentionKind::Fused);
        attention(q, k, v, spans(&views.forests, &device), options)
    };
    let copies = [&views.q, &views.k, &views.v].map(|t| t.clone() + 0.0);
    let [q, k, v] = copies;
    let expected = run(q, k, v);
    let found = run(views.q.clone(), views.k.clone(), views.v.clone());
    assert_eq!(values(&expected), values(&found));
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let steps: Vec<usize> = (0..300).map(|i| if i % 70 == 69 { 1 + i % 40 } else { 0 }).collect();
    let device = Device::flex().autodiff();
    let case = case(&device, 300, &[Forest::from_steps(&steps), Forest::chain(300)], None);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (out, dq, dk, dv) = pool.install(|| differentiate(&case, AttentionKind::Fused));
        [out, dq, dk, dv].map(|t| values(&t).into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let one = run(1);
    for threads in [2, 3, 5] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

/// Rows of one batch: mostly chains that fork now and then, some of them cut into many small trees.
fn forests() -> impl Strategy<Value = Vec<Forest>> {
    let step = prop_oneof![12 => Just(0usize), 1 => 1..60usize, 1 => Just(1000)];
    (1..200usize).prop_flat_map(move |keys| {
        let row = prop::collection::vec(step.clone(), keys).prop_map(|steps| Forest::from_steps(&steps));
        prop::collection::vec(row, 1..3)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn random_forests_agree_with_the_definition(
        forests in forests(),
        window in prop::option::of(1..80usize),
        cached in prop::option::of(0..200usize),
    ) {
        let keys = forests[0].len();
        let queries = keys - cached.unwrap_or(0).min(keys - 1);
        check_on(&Device::flex().autodiff(), queries, &forests, window);
    }
}
