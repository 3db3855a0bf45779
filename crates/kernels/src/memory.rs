//! Where memory comes from, and what becomes of it when it is freed.

#[cfg(feature = "allocator")]
use std::alloc::{GlobalAlloc, Layout, System};

#[cfg(feature = "allocator")]
use mimalloc::MiMalloc;

/// Lets the C library keep large buffers that are freed, since the next layer and the next step need the same again.
///
/// By itself glibc gives them back to the system, which maps and zeroes every page anew when it is touched; in a training
/// step that is most of the time spent in the kernel. What a program has at its peak does not change by this, but between
/// peaks it has no less. For a program to call before it starts threads; with other C libraries nothing happens.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// Larger buffers are mapped, and unmapped when they are freed; older versions refuse to have it any higher.
        const MAPPED_FROM: libc::c_int = 32 << 20;
        // SAFETY: `mallopt` takes any two numbers, and refuses what it cannot do.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM);
            libc::mallopt(libc::M_TRIM_THRESHOLD, -1); // never
            // Threads with heaps of their own would each keep what they have freed.
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
    }
}

/// An allocator for programs that train: small pieces of memory come from mimalloc, in which threads do not wait for each
/// other, as they do for one heap of glibc while they tokenise; large ones from the system, so that what
/// [`keep_freed_memory`] says holds for the buffers of tensors.
///
/// ```
/// #[global_allocator]
/// static ALLOCATOR: emberlora_kernels::Allocator = emberlora_kernels::Allocator;
/// # fn main() {}
/// ```
#[cfg(feature = "allocator")]
#[derive(Clone, Copy, Debug)]
pub struct Allocator;

#[cfg(feature = "allocator")]
impl Allocator {
    /// Bytes of the largest small piece.
    const SMALL: usize = 32 << 10;

    #[inline(always)]
    const fn of(size: usize) -> &'static dyn GlobalAlloc {
        if size <= Self::SMALL { &MiMalloc } else { &System }
    }
}

// SAFETY: memory of a size is always asked for and given back at the same allocator, each of which keeps the contract. Where
// a piece changes over to the other one, it is copied up to the smaller of both sizes.
#[cfg(feature = "allocator")]
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        unsafe { Self::of(layout.size()).alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        unsafe { Self::of(layout.size()).alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on; memory of this size came from the same allocator.
        unsafe { Self::of(layout.size()).dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if (layout.size() <= Self::SMALL) == (size <= Self::SMALL) {
            // SAFETY: the caller's promise is passed on; both sizes are of the same allocator.
            return unsafe { Self::of(size).realloc(memory, layout, size) };
        }
        // SAFETY: the caller promises that the new size is valid with this alignment, and that the memory has the old one. A
        // fresh piece overlaps no other.
        unsafe {
            let moved = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !moved.is_null() {
                std::ptr::copy_nonoverlapping(memory, moved, size.min(layout.size()));
                self.dealloc(memory, layout);
            }
            moved
        }
    }
}

#[cfg(all(test, feature = "allocator"))]
mod tests {
    use super::*;

    #[test]
    fn memory_keeps_its_content_when_it_grows_and_shrinks_past_what_is_small() {
        let mut layout = Layout::from_size_align(100, 64).unwrap();
        // SAFETY: the layouts are not empty, and what is given back has the layout that it was asked for with last.
        unsafe {
            let mut memory = Allocator.alloc_zeroed(layout);
            std::slice::from_raw_parts_mut(memory, 100).fill(7);
            for size in [Allocator::SMALL, Allocator::SMALL + 1, 1 << 20, 200, 150] {
                memory = Allocator.realloc(memory, layout, size);
                layout = Layout::from_size_align(size, 64).unwrap();
                assert!(memory.addr().is_multiple_of(64));
                assert_eq!(std::slice::from_raw_parts(memory, 100), [7; 100], "{size} bytes");
            }
            Allocator.dealloc(memory, layout);
        }
    }
}
