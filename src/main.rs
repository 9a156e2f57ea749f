//! Arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    baletheus::sidecar::main(std::env::args_os())
}
