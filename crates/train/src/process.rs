//! What the process has needed so far.

/// The largest resident set the process has had, in bytes: `VmHWM` of `/proc/self/status`.
///
/// `None` where the system has no such file (anything but Linux).
pub fn peak_memory_bytes() -> Option<u64> {
    parse_high_water_mark(&std::fs::read_to_string("/proc/self/status").ok()?)
}

fn parse_high_water_mark(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_high_water_mark_is_read_in_bytes() {
        assert_eq!(parse_high_water_mark("Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n"), Some(2048 * 1024));
        assert_eq!(parse_high_water_mark("Name:\tx\n"), None);
        assert_eq!(parse_high_water_mark("VmHWM: lots\n"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_reports_one() {
        assert!(peak_memory_bytes().is_some_and(|bytes| bytes > 0));
    }
}
