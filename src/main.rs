//! The `emberlora` command.
fn main() -> std::process::ExitCode {
    emberlora::cli::main()
}
