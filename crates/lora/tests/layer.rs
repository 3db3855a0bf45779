//! What the layer computes and what it trains.

mod common;

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Device, Tensor};
use common::*;
use emberlora_lora::{LoraLinear, LoraOptions, Pass, Projections, Targets, Weight, attach, detach};

fn training() -> Device {
    Device::flex().autodiff()
}

/// The weight of a layer that is not packed.
fn parameter(layer: &LoraLinear) -> &Param<Tensor<2>> {
    let Weight::Dense(weight) = &layer.weight else { panic!("packed") };
    weight
}

/// A model with adapters that do something, on a device that can train them.
fn adapted(options: &LoraOptions) -> (Tiny, Device) {
    let device = training();
    let mut model = Tiny::new(&device);
    attach(&mut model, options, &device).unwrap();
    fill_b(&mut model);
    (model, device)
}

#[test]
fn fresh_adapters_leave_the_output_unchanged() {
    let device = training();
    let mut model = Tiny::new(&device);
    let x = noise(1, [7, WIDTH], &device);
    let before = values(&model.forward(x.clone(), &Pass::eval()));
    attach(&mut model, &options(3, Targets::AllLinear), &device).unwrap();
    assert_eq!(values(&model.forward(x, &Pass::eval())), before);
}

#[test]
fn adapters_can_be_left_out_of_a_pass() {
    let (mut model, device) = adapted(&options(3, suffixes(&["up_proj", "lm_head"])));
    let x = noise(1, [7, WIDTH], &device);
    let with = values(&model.forward(x.clone(), &Pass::eval()));
    let without = values(&model.forward(x.clone(), &Pass::base()));
    assert_ne!(with, without);
    detach(&mut model);
    assert_eq!(values(&model.forward(x, &Pass::eval())), without);
}

#[test]
fn merged_weights_compute_what_the_adapters_do() {
    for rslora in [false, true] {
        let (mut model, device) = adapted(&LoraOptions { rslora, ..options(3, suffixes(&["up_proj", "down_proj"])) });
        let x = noise(1, [7, WIDTH], &device);
        let adapted = values(&model.forward(x.clone(), &Pass::eval()));
        model.visit_projections(&mut |_, linear| {
            let bias = linear.bias.as_ref().map(|bias| bias.val());
            *linear = LoraLinear::new(linear.merged_weight(), bias);
        });
        assert_close(&values(&model.forward(x, &Pass::eval())), &adapted, 1e-5);
    }
}

#[test]
fn the_formula_is_w_x_plus_bias_plus_s_b_a_x() {
    let (model, device) = adapted(&options(2, suffixes(&["up_proj"])));
    let layer = &model.blocks[0].up;
    let adapter = layer.adapter.as_ref().unwrap();
    let x = numbers(3, WIDTH);
    let (w, bias) = (values(&layer.weight.as_dense().unwrap()), values(&layer.bias.as_ref().unwrap().val()));
    let (a, b) = (values(&adapter.a.val()), values(&adapter.b.val()));
    let dot = |row: &[f32], v: &[f32]| row.iter().zip(v).map(|(p, q)| p * q).sum::<f32>();
    let ax: Vec<f32> = a.chunks(WIDTH).map(|row| dot(row, &x)).collect();
    let expected: Vec<f32> =
        (0..INNER).map(|i| dot(&w[i * WIDTH..][..WIDTH], &x) + bias[i] + 2.0 * dot(&b[i * 2..][..2], &ax)).collect();
    let y = layer.forward(Tensor::<1>::from_floats(x.as_slice(), &device), &Pass::eval());
    assert_close(&values(&y), &expected, 1e-5);
    let y = layer.forward(Tensor::<1>::from_floats(x.as_slice(), &device).unsqueeze::<4>(), &Pass::eval());
    assert_eq!(y.dims(), [1, 1, 1, INNER]);
    assert_close(&values(&y), &expected, 1e-5);
}

#[test]
fn a_layer_of_burn_keeps_its_function_and_its_bytes() {
    let device = training();
    let linear: Linear = LinearConfig::new(WIDTH, INNER).init(&device);
    let x = noise(1, [7, WIDTH], &device);
    let (expected, ids) = (linear.forward(x.clone()), [linear.weight.id, linear.bias.as_ref().unwrap().id]);
    let layer = LoraLinear::from_linear(linear);
    assert_eq!((layer.in_features(), layer.out_features()), (WIDTH, INNER));
    assert_eq!([parameter(&layer).id, layer.bias.as_ref().unwrap().id], ids);
    assert_close(&values(&layer.forward(x, &Pass::eval())), &values(&expected), 1e-6);
    assert!(!layer.weight.as_dense().unwrap().is_tracked() && !layer.bias.as_ref().unwrap().val().is_tracked());
}

#[test]
fn only_the_adapters_get_gradients_and_move() {
    let (mut model, device) = adapted(&options(2, Targets::AllLinear));
    let frozen = |model: &Tiny| {
        let mut all = Vec::new();
        model.projections(&mut |_, linear| {
            all.push(values(&linear.weight.as_dense().unwrap()));
            all.extend(linear.bias.as_ref().map(|bias| values(&bias.val())));
        });
        all
    };
    let (weights, before) = (frozen(&model), factors(&model));
    let x = noise(1, [7, WIDTH], &device);
    let mut optimizer = AdamWConfig::new().init();
    for step in 0..3 {
        let loss = model.forward(x.clone(), &Pass::train(1, step)).powf_scalar(2.0).mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        assert_eq!(gradients.len(), 8);
        model.projections(&mut |name, linear| {
            assert!(
                !parameter(linear).is_require_grad() && gradients.get::<2>(parameter(linear).id).is_none(),
                "{name}"
            );
            if let Some(bias) = &linear.bias {
                assert!(!bias.is_require_grad() && gradients.get::<1>(bias.id).is_none(), "{name}");
            }
        });
        model = optimizer.step(1e-2, model, gradients);
    }
    assert_eq!(frozen(&model), weights);
    for ((name, a, b), (_, old_a, old_b)) in factors(&model).iter().zip(&before) {
        assert!(a != old_a && b != old_b, "{name}");
    }
}

#[test]
fn frozen_parameters_stay_frozen_through_train_and_valid() {
    let (model, _) = adapted(&options(2, Targets::AllLinear));
    let model = model.valid().train();
    model.projections(&mut |name, linear| {
        assert!(!parameter(linear).is_require_grad(), "{name}");
        if let Some(adapter) = &linear.adapter {
            assert!(adapter.a.is_require_grad() && adapter.b.is_require_grad(), "{name}");
        }
    });
}

#[test]
fn a_tracked_weight_is_taken_out_of_its_graph() {
    let device = training();
    let source = noise(1, [INNER, WIDTH], &device).require_grad();
    let layer = LoraLinear::new(source.clone() * 2.0, None);
    assert!(!layer.weight.as_dense().unwrap().is_tracked());
    let layer = LoraLinear::new(source, None);
    assert!(!layer.weight.as_dense().unwrap().is_tracked() && !parameter(&layer).is_require_grad());
}

#[test]
fn dropout_depends_on_seed_step_and_layer_and_is_off_in_evaluation() {
    let (model, device) = adapted(&LoraOptions { dropout: 0.5, ..options(2, suffixes(&["up_proj"])) });
    let x = noise(1, [9, WIDTH], &device);
    let run = |pass: &Pass| values(&model.blocks[0].up.forward(x.clone(), pass));
    assert_eq!(run(&Pass::train(1, 2)), run(&Pass::train(1, 2)));
    assert_ne!(run(&Pass::train(1, 2)), run(&Pass::train(1, 3)));
    assert_ne!(run(&Pass::train(1, 2)), run(&Pass::train(2, 2)));
    assert_ne!(run(&Pass::train(1, 2)), run(&Pass::eval()));
    assert_eq!(run(&Pass::eval()), run(&Pass::eval()));

    // The same layer under another name drops other elements.
    let mut twin = model.blocks[0].up.clone();
    if let Some(adapter) = &mut twin.adapter {
        adapter.stream += 1;
    }
    assert_ne!(values(&twin.forward(x.clone(), &Pass::train(1, 2))), run(&Pass::train(1, 2)));
    assert_eq!(values(&twin.forward(x.clone(), &Pass::eval())), run(&Pass::eval()));
}

#[test]
fn dropout_keeps_the_mean_of_the_update() {
    let (model, device) = adapted(&LoraOptions { dropout: 0.25, ..options(2, suffixes(&["up_proj"])) });
    let (x, layer) = (noise(1, [1, WIDTH], &device), &model.blocks[0].up);
    let expected = values(&layer.forward(x.clone(), &Pass::eval()));
    let mut mean = vec![0f64; expected.len()];
    let rounds = 4000;
    for step in 0..rounds {
        for (sum, y) in mean.iter_mut().zip(values(&layer.forward(x.clone(), &Pass::train(5, step)))) {
            *sum += f64::from(y) / rounds as f64;
        }
    }
    let mean: Vec<f32> = mean.into_iter().map(|v| v as f32).collect();
    assert_close(&mean, &expected, 0.05);
}

#[test]
fn narrow_weights_and_activations_keep_their_formats() {
    let (mut model, device) = adapted(&options(2, suffixes(&["up_proj"])));
    let layer = &mut model.blocks[0].up;
    let x = noise(1, [7, WIDTH], &device);
    for dtype in [DType::BF16, DType::F16] {
        let adapter = layer.adapter.take();
        let weight = layer.weight.as_dense().unwrap().inner().cast(dtype);
        *layer = LoraLinear::new(weight, layer.bias.as_ref().map(|bias| bias.val()));
        layer.adapter = adapter;
        let y = layer.forward(x.clone(), &Pass::eval());
        assert_eq!((y.dtype(), layer.weight.as_dense().unwrap().dtype()), (DType::F32, dtype));
        let reference = LoraLinear::new(layer.merged_weight(), layer.bias.as_ref().map(|bias| bias.val()));
        assert_close(&values(&y), &values(&reference.forward(x.clone(), &Pass::eval())), 1e-5);

        let narrow = layer.forward(x.clone().cast(dtype), &Pass::eval());
        assert_eq!(narrow.dtype(), dtype);
        assert_close(&values(&narrow), &values(&y), 0.1);
        assert_eq!(layer.adapter.as_ref().unwrap().a.val().dtype(), DType::F32);
    }
}
