//! What the commands write.

use std::process::{Command, Stdio};

/// As a shell has it for a program that a signal has ended: 128 and the number of SIGPIPE.
const NO_READER: i32 = 141;

#[test]
fn a_reader_that_has_read_enough_is_no_error() -> std::io::Result<()> {
    for command in [&["version"][..], &["version", "--json"], &["completion", "bash"]] {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_flynn-host"))
            .args(command)
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()?
            .wait_with_output()?;
        assert_eq!(output.status.code(), Some(NO_READER), "{command:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{command:?}");
    }
    Ok(())
}
