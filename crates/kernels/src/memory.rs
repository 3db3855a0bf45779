//! What becomes of memory that is freed.

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
