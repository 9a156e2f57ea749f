//! Hands the arguments to `cli.rs`.

use std::process::ExitCode;

fn main() -> ExitCode {
    baletheus::cli::main(std::env::args_os())
}
