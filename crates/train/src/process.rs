//! What the process has needed so far, memory and time, and what the machine has.

/// The largest resident set the process has had, in bytes: `VmHWM` of `/proc/self/status`.
///
/// `None` where the system has no such file (anything but Linux).
pub fn peak_memory_bytes() -> Option<u64> {
    parse_kibibytes(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// How long ago the process started, in seconds: what `/proc/uptime` says less the start time in `/proc/self/stat`, both
/// in hundredths.
///
/// `None` where the system has no such files (anything but Linux).
pub(crate) fn seconds_since_start() -> Option<f64> {
    let read = |path| std::fs::read_to_string(path).ok();
    let up: f64 = read("/proc/uptime")?.split_whitespace().next()?.parse().ok()?;
    Some((up - parse_start(&read("/proc/self/stat")?)?).max(0.0))
}

/// The memory of the machine, in bytes: `MemTotal` of `/proc/meminfo`. `None` on anything but Linux.
pub(crate) fn total_memory_bytes() -> Option<u64> {
    parse_kibibytes(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// What the processor calls itself: `model name` of `/proc/cpuinfo`. `None` where the system does not say.
pub(crate) fn processor_name() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let name = info.lines().find_map(|line| line.strip_prefix("model name"))?.trim_start();
    Some(name.strip_prefix(':')?.trim().to_owned())
}

fn parse_kibibytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// Field 22 of proc(5)'s stat, seconds from the boot.
fn parse_start(stat: &str) -> Option<f64> {
    // The second field is the program's name in parentheses and may hold anything. Linux shows times in hundredths of a
    // second, whatever its own clock.
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_whitespace().nth(19)?.parse::<f64>().ok()? / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_high_water_mark_is_read_in_bytes() {
        assert_eq!(parse_kibibytes("Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n", "VmHWM:"), Some(2048 * 1024));
        assert_eq!(parse_kibibytes("Name:\tx\n", "VmHWM:"), None);
        assert_eq!(parse_kibibytes("VmHWM: lots\n", "VmHWM:"), None);
    }

    #[test]
    fn the_start_is_found_behind_any_name() {
        let stat = "17 (a) S) R 1 17 17 0 -1 4194304 1 0 0 0 1 2 0 0 20 0 1 0 123456 5 6";
        assert_eq!(parse_start(stat), Some(1234.56));
        assert_eq!(parse_start("17 (cat) R 1"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells_both() {
        assert!(peak_memory_bytes().is_some_and(|bytes| bytes > 0));
        assert!(seconds_since_start().is_some_and(|seconds| seconds < 3600.0));
    }
}
