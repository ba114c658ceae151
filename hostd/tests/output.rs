//! What the commands write.

use std::process::{Command, Stdio};

#[test]
fn a_reader_that_has_read_enough_is_no_error() -> std::io::Result<()> {
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_flynn-host"))
        .arg("version")
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()?
        .wait_with_output()?;
    assert!(!output.status.success(), "the line was read by nobody");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    Ok(())
}
