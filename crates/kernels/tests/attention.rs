//! Fused attention against the eager one, and both against the definition.

mod support;

use burn::tensor::{Device, Tensor};
use emberlora_kernels::{AttentionKind, AttentionOptions, attention};
use support::*;

struct Case {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    starts: Vec<i64>,
    window: Option<usize>,
}

/// `[batch, queries, heads, 8]` against `[batch, keys, kv_heads, 8]`.
fn case(device: &Device, queries: usize, keys: usize, starts: &[i64], window: Option<usize>) -> Case {
    device.seed(3);
    let (batch, heads, kv_heads, dim) = (2, 6, 2, 8);
    Case {
        q: normal([batch, queries, heads, dim], 1.0, device),
        k: normal([batch, keys, kv_heads, dim], 1.0, device),
        v: normal([batch, keys, kv_heads, dim], 1.0, device),
        starts: starts.to_vec(),
        window,
    }
}

type Results = (Tensor<4>, Tensor<4>, Tensor<4>, Tensor<4>);

/// O, dQ, dK, dV.
fn differentiate(case: &Case, kind: AttentionKind) -> Results {
    let (q, k, v) = (leaf(&case.q), leaf(&case.k), leaf(&case.v));
    let [batch, queries, _, _] = q.dims();
    let starts = ints(&case.starts, [batch, queries], &q.device());
    let options = AttentionOptions::new(0.35, case.window, kind);
    let out = attention(q.clone(), k.clone(), v.clone(), starts, options);
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
            let absolute = i + keys - queries;
            let start = case.starts[b * queries + i] as usize;
            let first = case.window.map_or(start, |w| start.max((absolute + 1).saturating_sub(w)));
            for h in 0..heads {
                let kv = h / (heads / kv_heads);
                let query = &q[((b * queries + i) * heads + h) * dim..][..dim];
                let at = |j: usize| ((b * keys + j) * kv_heads + kv) * dim;
                let weights: Vec<f64> = (first..=absolute)
                    .map(|j| {
                        let dot: f64 = query.iter().zip(&k[at(j)..][..dim]).map(|(a, b)| f64::from(a * b)).sum();
                        (0.35 * dot).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..dim {
                    let value: f64 = weights.iter().zip(first..).map(|(w, j)| w / sum * f64::from(v[at(j) + d])).sum();
                    out[((b * queries + i) * heads + h) * dim + d] = value as f32;
                }
            }
        }
    }
    out
}

fn check(queries: usize, keys: usize, starts: &[i64], window: Option<usize>) {
    for device in devices() {
        let case = case(&device, queries, keys, starts, window);
        let (fused, eager) = (differentiate(&case, AttentionKind::Fused), differentiate(&case, AttentionKind::Eager));
        let expected = Tensor::<1>::from_floats(by_definition(&case).as_slice(), &device).reshape(case.q.dims());
        assert_close("fused O", &expected, &fused.0, 3e-6);
        assert_close("eager O", &expected, &eager.0, 3e-6);
        assert_close("dQ", &eager.1, &fused.1, 5e-6);
        assert_close("dK", &eager.2, &fused.2, 5e-6);
        assert_close("dV", &eager.3, &fused.3, 5e-6);
    }
}

#[test]
fn one_document_per_row() {
    check(9, 9, &[0; 18], None);
}

#[test]
fn packed_documents_do_not_see_each_other() {
    let starts = [0, 0, 0, 3, 3, 3, 3, 7, 7, 0, 1, 1, 1, 1, 1, 1, 1, 8];
    check(9, 9, &starts, None);
}

#[test]
fn a_sliding_window_hides_what_lies_further_back() {
    let starts = [0, 0, 0, 3, 3, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    check(9, 9, &starts, Some(3));
    check(9, 9, &starts, Some(2));
}

#[test]
fn later_queries_see_the_keys_of_a_cache() {
    check(3, 10, &[0; 6], None);
    check(1, 10, &[2, 4], Some(5));
}

#[test]
fn a_window_of_one_key_copies_its_value() {
    let device = Device::flex().autodiff();
    let case = case(&device, 9, 9, &[0; 18], Some(1));
    let (out, ..) = differentiate(&case, AttentionKind::Fused);
    let copied = case.v.clone().reshape([2, 9, 2, 1, 8]).expand([2, 9, 2, 3, 8]).reshape([2, 9, 6, 8]);
    assert_close("O", &copied, &out, 1e-6);
}
