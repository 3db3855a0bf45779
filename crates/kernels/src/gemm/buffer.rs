//! Memory for packed operands, which is used again.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytemuck::{Pod, Zeroable};

/// What a matrix unit loads at one time: 16 rows of 32 numbers of 16 bits. It begins with a cache line.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Tile(pub [[u16; Tile::DEPTH]; Tile::ROWS]);

impl Tile {
    pub(super) const ROWS: usize = 16;
    pub(super) const DEPTH: usize = 32;
    const FLOATS: usize = size_of::<Tile>() / size_of::<f32>();
}

/// Packed panels, as tiles or as floats. What is there at first is left over from earlier.
#[derive(Default)]
pub(crate) struct Buffer(Vec<Tile>);

impl Buffer {
    pub(super) const NEW: Self = Self(Vec::new());

    pub(super) fn tiles(&self) -> &[Tile] {
        &self.0
    }

    pub(super) fn floats(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }

    /// At least `count` tiles; those that are there are kept.
    pub(super) fn tiles_mut(&mut self, count: usize) -> &mut [Tile] {
        if self.0.len() < count {
            self.0.resize(count, Tile::zeroed());
        }
        &mut self.0[..count]
    }

    /// At least `count` floats; those that are there are kept.
    pub(crate) fn floats_mut(&mut self, count: usize) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(self.tiles_mut(count.div_ceil(Tile::FLOATS)))[..count]
    }
}

/// Buffers of operands that are gone, so that the next ones need no fresh memory.
static SPARE: Mutex<Vec<Buffer>> = Mutex::new(Vec::new());

/// More are never in use at one time by one thread that multiplies.
const KEPT: usize = 4;

fn spare() -> MutexGuard<'static, Vec<Buffer>> {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A buffer that another one uses when this one is gone.
pub(crate) struct Lent(Buffer);

impl Lent {
    /// One of at least `count` tiles.
    pub(super) fn tiles(count: usize) -> Self {
        let mut spare = spare();
        // The smallest that is large enough, else the largest, which then grows.
        let fitting = (0..spare.len()).filter(|&i| spare[i].0.len() >= count).min_by_key(|&i| spare[i].0.len());
        let chosen = fitting.or_else(|| (0..spare.len()).max_by_key(|&i| spare[i].0.len()));
        let mut buffer = chosen.map(|i| spare.swap_remove(i)).unwrap_or_default();
        drop(spare);
        if buffer.0.len() < count {
            buffer = Buffer::default(); // freed first: a growing vector would copy what nobody needs
            buffer.tiles_mut(count);
        }
        Self(buffer)
    }

    /// One of at least `count` floats.
    pub(crate) fn floats(count: usize) -> Self {
        Self::tiles(count.div_ceil(Tile::FLOATS))
    }
}

impl Deref for Lent {
    type Target = Buffer;

    fn deref(&self) -> &Buffer {
        &self.0
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Buffer {
        &mut self.0
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut spare = spare();
        if spare.len() < KEPT {
            spare.push(std::mem::take(&mut self.0));
        }
    }
}
