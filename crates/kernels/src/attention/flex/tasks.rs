//! Tasks of different sizes on all cores.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Multiply-adds below which all tasks run on the calling thread: waking a second one costs about as much.
const PARALLEL_FROM: usize = 1 << 20;

/// Runs `task` on every number below `count`. Each core takes the next one when it is done with its last, so large
/// tasks should come first; `scratch` makes what a core keeps between its tasks.
pub fn each_task<S>(count: usize, work: usize, scratch: impl Fn() -> S + Sync, task: impl Fn(&mut S, usize) + Sync) {
    let next = AtomicUsize::new(0);
    let take_all = || {
        let mut scratch = scratch();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return;
            }
            task(&mut scratch, number);
        }
    };
    if work < PARALLEL_FROM {
        return take_all();
    }
    let threads = rayon::current_num_threads().min(count);
    rayon::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| take_all());
        }
        take_all();
    });
}
