//! A recomputed block against the same block recorded.

mod support;

use std::sync::{Arc, Mutex};

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use emberlora_kernels::checkpoint::{Values, backward_with, checkpoint};
use emberlora_kernels::{AdapterPath, Dropout, Input, Projection, ProjectionAdapter, lora_linear, project, rms_norm};
use support::*;

#[derive(Module, Debug)]
struct Block {
    w: Param<Tensor<2>>,
    a: Param<Tensor<2>>,
    b: Param<Tensor<2>>,
    norm: Param<Tensor<1>>,
}

impl Block {
    fn new(device: &Device) -> Self {
        let frozen = |t| Param::from_tensor(t).set_require_grad(false);
        Self {
            w: frozen(normal([16, 16], 0.25, device)),
            a: Param::from_tensor(normal([2, 16], 0.25, device)),
            b: Param::from_tensor(normal([16, 2], 0.25, device)),
            norm: Param::from_tensor(Tensor::ones([16], device)).set_require_grad(false),
        }
    }

    fn forward(&self, x: Tensor<2>, layer: u64) -> Tensor<2> {
        let h = rms_norm(x.clone(), self.norm.val(), 1e-5);
        let dropout = Some(Dropout::new(0.2, layer));
        x + lora_linear(h, self.w.val(), self.a.val(), self.b.val(), 1.5, dropout).tanh()
    }
}

/// The loss and the gradients of the input and of every A and B.
fn run(blocks: &[Block], x: &Tensor<2>, track_x: bool, recompute: bool) -> (Tensor<1>, Vec<Vec<f32>>) {
    let x = if track_x { leaf(x) } else { x.clone().detach() };
    let mut h = x.clone();
    for (i, block) in blocks.iter().enumerate() {
        h = match recompute {
            true => checkpoint(block, h, move |block, h, _| block.forward(h, i as u64)),
            false => block.forward(h, i as u64),
        };
    }
    let loss = probe(h);
    let grads = loss.backward();
    let mut all: Vec<Vec<f32>> = x.grad(&grads).iter().map(values).collect();
    for block in blocks {
        all.push(values(&block.a.val().grad(&grads).unwrap()));
        all.push(values(&block.b.val().grad(&grads).unwrap()));
    }
    (loss, all)
}

#[test]
fn recomputation_changes_no_bit_of_loss_and_gradients() {
    for device in devices() {
        device.seed(8);
        let blocks: Vec<Block> = (0..3).map(|_| Block::new(&device)).collect();
        let x = normal([5, 16], 1.0, &device);
        for track_x in [true, false] {
            let (recorded, recomputed) = (run(&blocks, &x, track_x, false), run(&blocks, &x, track_x, true));
            assert_eq!(values(&recorded.0), values(&recomputed.0));
            assert_eq!(recorded.1, recomputed.1);
        }
    }
}

#[test]
fn a_block_used_twice_gets_both_gradients() {
    let device = Device::flex().autodiff().gradient_checkpointing();
    let block = Block::new(&device);
    let shared = [block.clone(), block];
    let x = normal([5, 16], 1.0, &device);
    assert_eq!(run(&shared, &x, true, false).1, run(&shared, &x, true, true).1);
}

#[test]
fn several_blocks_form_one_segment() {
    let device = Device::flex().autodiff().gradient_checkpointing();
    let blocks: Vec<Block> = (0..4).map(|_| Block::new(&device)).collect();
    let x = normal([5, 16], 1.0, &device);
    let segmented = |x: Tensor<2>| {
        blocks.chunks(2).enumerate().fold(x, |h, (i, chunk)| {
            checkpoint(&chunk.to_vec(), h, move |chunk: &Vec<Block>, h, _| {
                chunk.iter().enumerate().fold(h, |h, (j, block)| block.forward(h, (2 * i + j) as u64))
            })
        })
    };
    let loss = probe(segmented(leaf(&x)));
    let grads = loss.backward();
    let expected = run(&blocks, &x, true, false).1;
    assert_eq!(values(&blocks[3].b.val().grad(&grads).unwrap()), expected[8]);
}

#[test]
fn gradients_do_not_need_the_result_of_the_second_run() {
    for device in devices() {
        device.seed(9);
        let block = Block::new(&device);
        let x = normal([5, 16], 1.0, &device);
        let gradients = |read_again: bool| {
            let x = leaf(&x);
            let y = checkpoint(&block, x.clone(), move |block, x, values| {
                let adapter =
                    ProjectionAdapter { a: block.a.val(), b: block.b.val(), path: AdapterPath::new(1.5, None) };
                let projection = Projection { weight: block.w.val().into(), bias: None, adapter: Some(adapter) };
                let values = if read_again { Values::Read } else { values };
                project(x.clone().tanh(), Input::Plain, &[projection], Some(x), values)
            });
            let grads = probe(y).backward();
            [x.grad(&grads), block.a.val().grad(&grads), block.b.val().grad(&grads)].map(|g| self::values(&g.unwrap()))
        };
        assert_eq!(gradients(false), gradients(true));
    }
}

/// The runs of a block in one step on `device`, with what becomes of their values.
fn runs(device: &Device) -> Vec<Values> {
    let block = Block::new(device);
    let runs = Arc::new(Mutex::new(Vec::new()));
    let recorded = runs.clone();
    let y = checkpoint(&block, normal([5, 16], 1.0, device), move |block, x, values| {
        recorded.lock().unwrap().push(values);
        block.forward(x, 0)
    });
    probe(y).backward();
    let runs = runs.lock().unwrap();
    runs.clone()
}

#[test]
fn the_device_decides_whether_a_block_runs_again() {
    let device = Device::flex().autodiff();
    assert_eq!(runs(&device), [Values::Read]);
    assert_eq!(runs(&device.gradient_checkpointing()), [Values::Read, Values::Unread]);
}

#[test]
fn without_autodiff_the_block_just_runs() {
    let device = Device::flex();
    let block = Block::new(&device).no_grad();
    let x = normal([5, 16], 1.0, &device);
    let y = checkpoint(&block, x.clone(), |block, x, _| block.forward(x, 0));
    assert_eq!(values(&y), values(&block.forward(x, 0)));
}

#[test]
#[should_panic(expected = "captured a tracked tensor")]
fn a_captured_tracked_tensor_is_refused_in_the_forward_pass() {
    let device = Device::flex().autodiff().gradient_checkpointing();
    let block = Block::new(&device);
    let captured = Tensor::<2>::ones([5, 16], &device).require_grad() * 2.0;
    let x = normal([5, 16], 1.0, &device).require_grad();
    checkpoint(&block, x, move |block, x, _| block.forward(x, 0) + captured.clone());
}

#[test]
fn an_output_gradient_can_be_given() {
    let device = Device::flex().autodiff();
    let x = normal([3, 2], 1.0, &device).require_grad();
    let g = normal([3, 2], 1.0, &device);
    let grads = backward_with(x.clone().tanh(), g.clone());
    let expected = g * (Tensor::ones([3, 2], &device) - x.clone().detach().tanh().square());
    assert_close("dx", &expected, &x.grad(&grads).unwrap(), 1e-6);
}
