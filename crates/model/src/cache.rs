//! Keys and values of the tokens that a generation has already seen.

use burn::tensor::{Device, Tensor};

/// The keys and values of every block, for [`CausalLm::step`](crate::CausalLm::step).
///
/// The buffers are allocated with room to spare and filled in place, so a step copies its own tokens and no others.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
    capacity: usize,
}

impl KvCache {
    /// An empty cache that grows as it is needed.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty cache with room for `tokens` tokens.
    pub fn with_capacity(tokens: usize) -> Self {
        Self { layers: Vec::new(), capacity: tokens }
    }

    /// How many tokens of each row it holds.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.len)
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The blocks' caches, made on first use.
    pub(crate) fn layers(&mut self, count: usize) -> &mut [LayerCache] {
        let capacity = self.capacity;
        self.layers.resize_with(count, || LayerCache { capacity, ..LayerCache::default() });
        &mut self.layers
    }
}

/// One block's keys and values.
#[derive(Clone, Debug, Default)]
pub(crate) struct LayerCache {
    /// `[rows, room, kv_heads, head_dim]` each.
    buffers: Option<(Tensor<4>, Tensor<4>)>,
    len: usize,
    /// Room to allocate at first.
    capacity: usize,
}

impl LayerCache {
    /// Appends `[rows, new, kv_heads, head_dim]` and returns all keys and values so far.
    pub(crate) fn append(&mut self, k: Tensor<4>, v: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let [rows, new, heads, dim] = k.dims();
        let len = self.len + new;
        let (keys, values) = match self.buffers.take() {
            Some((keys, values)) if keys.dims()[1] >= len => (keys, values),
            old => {
                let room = len.max(self.capacity).max(2 * self.len);
                let shape = [rows, room, heads, dim];
                let grown = |new: &Tensor<4>, old: Option<Tensor<4>>| {
                    let fresh = empty(shape, new, &new.device());
                    match old {
                        Some(old) => fresh.slice_assign([0..rows, 0..self.len], old.slice([0..rows, 0..self.len])),
                        None => fresh,
                    }
                };
                let (old_keys, old_values) = old.unzip();
                (grown(&k, old_keys), grown(&v, old_values))
            }
        };
        let written = [0..rows, self.len..len];
        let (keys, values) = (keys.slice_assign(written.clone(), k), values.slice_assign(written, v));
        let seen = [0..rows, 0..len];
        let all = (keys.clone().slice(seen.clone()), values.clone().slice(seen));
        self.buffers = Some((keys, values));
        self.len = len;
        all
    }
}

fn empty(shape: [usize; 4], like: &Tensor<4>, device: &Device) -> Tensor<4> {
    Tensor::zeros(shape, (device, like.dtype()))
}
