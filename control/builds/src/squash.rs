//! Writes a [`Tree`] as a clean tar into `mksquashfs`, which makes the squashfs file.
//!
//! The tool sees nothing but what this module writes: each path once, parents first, hard links after their target.
//! (Given other tars, it ignores second entries of a path, refuses odd names and crashes on dangling links.)

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek as _, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use flynn_api::Digest;
use flynn_api::digest::Digester;
use tar::{EntryType, Header};

use crate::tar_format::write_record;
use crate::tree::{Attributes, Content, Node, Tree};

/// Makes squashfs files of tars. (Its sibling `sqfstar` cannot be told how hard to compress.)
const TOOL: &str = "mksquashfs";
/// How hard zstd tries: beyond this, time grows much faster than files shrink.
const LEVEL: &str = "6";

/// Why no squashfs file was made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SquashError {
    #[error("the disk for layers under way is full")]
    Full,
    #[error("mksquashfs failed: {0}")]
    Tool(String),
    #[error("cannot convert the layer: {0}")]
    Io(#[from] io::Error),
}

/// Checks that the tool is there.
pub(crate) async fn check_tool() -> io::Result<()> {
    let tool = tokio::process::Command::new(TOOL)
        .arg("-version")
        .stdin(Stdio::null())
        .output()
        .await;
    tool.map(drop).map_err(|why| {
        let message = format!("{TOOL} cannot be run: {why}; install squashfs-tools 4.5 or later");
        io::Error::new(why.kind(), message)
    })
}

/// Makes a squashfs file of `tree`, whose contents lie in `tar`, at `target`. Returns its digest and length.
pub(crate) fn squash(tree: &Tree, tar: &mut File, target: &Path) -> Result<(Digest, u64), SquashError> {
    let root = &tree.root;
    let mut command = Command::new(TOOL);
    command
        .arg("-")
        .arg(target)
        .args([
            "-tar",
            "-comp",
            "zstd",
            "-Xcompression-level",
            LEVEL,
            "-exit-on-error",
        ])
        .args(["-quiet", "-no-progress", "-processors", "2", "-mem", "256M"])
        .args(["-root-mode", &format!("{:o}", root.mode)])
        .args([
            "-root-uid",
            &root.uid.to_string(),
            "-root-gid",
            &root.gid.to_string(),
        ])
        // The one way to keep the present time out of the file. Later times would be cut to this one.
        .env("SOURCE_DATE_EPOCH", tree.latest().to_string())
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let (input, complaints) = (child.stdin.take(), child.stderr.take());
    let listener = std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(complaints) = complaints {
            // What is longer than this is cut; what is not text is of no use.
            let _ = complaints.take(64 << 10).read_to_string(&mut text);
        }
        text
    });
    let written = input.map_or(Ok(()), |input| write_tar(tree, tar, input));
    if written.is_err() {
        // It may be waiting for more.
        let _ = child.kill();
    }
    let status = child.wait()?;
    let complaints = listener.join().unwrap_or_default();
    if complaints.contains("No space left") {
        return Err(SquashError::Full);
    }
    match written {
        // A closed pipe says that the tool ended early; its own words say why.
        Err(why) if why.kind() != io::ErrorKind::BrokenPipe => return Err(why.into()),
        _ if !status.success() => {
            let line = complaints
                .lines()
                .rev()
                .find(|line| !line.trim().is_empty())
                .unwrap_or("it gave no reason");
            return Err(SquashError::Tool(format!("{line} ({status})")));
        }
        Err(why) => return Err(why.into()),
        Ok(()) => {}
    }
    digest(target)
}

fn digest(path: &Path) -> Result<(Digest, u64), SquashError> {
    let mut file = File::open(path)?;
    let mut digester = Digester::default();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => digester.update(&buffer[..read]),
        }
    }
    let length = digester.length();
    Ok((digester.finish(), length))
}

fn write_tar(tree: &Tree, tar: &mut File, output: impl Write) -> io::Result<()> {
    let mut output = BufWriter::with_capacity(256 << 10, output);
    let mut first_names: HashMap<Content, &[u8]> = HashMap::new();
    let nothing = Attributes::default();
    for (path, node) in &tree.nodes {
        match node {
            Node::Directory { attributes, opaque } => {
                let opaque = opaque.then_some((&b"trusted.overlay.opaque"[..], &b"y"[..]));
                write_header(
                    &mut output,
                    path,
                    EntryType::Directory,
                    b"",
                    0,
                    attributes,
                    opaque,
                )?;
            }
            Node::File { attributes, content } => {
                // Empty files share a place only when they are one.
                if let Some(first) = first_names.get(content) {
                    write_header(&mut output, path, EntryType::Link, first, 0, attributes, None)?;
                    continue;
                }
                first_names.insert(*content, path);
                write_header(
                    &mut output,
                    path,
                    EntryType::Regular,
                    b"",
                    content.size,
                    attributes,
                    None,
                )?;
                tar.seek(SeekFrom::Start(content.offset))?;
                let copied = io::copy(&mut Read::by_ref(tar).take(content.size), &mut output)?;
                if copied != content.size {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                pad(&mut output, content.size)?;
            }
            Node::Symlink { attributes, target } => {
                write_header(&mut output, path, EntryType::Symlink, target, 0, attributes, None)?;
            }
            Node::Fifo { attributes } => {
                write_header(&mut output, path, EntryType::Fifo, b"", 0, attributes, None)?;
            }
            Node::Whiteout => write_header(&mut output, path, EntryType::Char, b"", 0, &nothing, None)?,
        }
    }
    output.write_all(&[0; 1024])?;
    output.flush()
}

/// Writes an entry's header, with an extended one before it where its fields do not fit.
fn write_header(
    output: &mut impl Write,
    path: &[u8],
    kind: EntryType,
    link: &[u8],
    size: u64,
    attributes: &Attributes,
    more: Option<(&[u8], &[u8])>,
) -> io::Result<()> {
    /// Bytes of the fields for names.
    const FIELD: usize = 100;
    let mut records = Vec::new();
    if path.len() > FIELD {
        write_record(&mut records, b"path", path);
    }
    if link.len() > FIELD {
        write_record(&mut records, b"linkpath", link);
    }
    let extended = attributes
        .extended
        .iter()
        .map(|(name, value)| (name.as_slice(), value.as_slice()));
    for (name, value) in extended.chain(more) {
        write_record(&mut records, &[b"SCHILY.xattr.", name].concat(), value);
    }
    if !records.is_empty() {
        let length = records.len() as u64;
        output.write_all(
            header(
                b"extended",
                EntryType::XHeader,
                b"",
                length,
                &Attributes::default(),
            )?
            .as_bytes(),
        )?;
        output.write_all(&records)?;
        pad(output, length)?;
    }
    let cut = |name: &[u8]| name[..name.len().min(FIELD)].to_vec();
    output.write_all(header(&cut(path), kind, &cut(link), size, attributes)?.as_bytes())
}

fn header(
    path: &[u8],
    kind: EntryType,
    link: &[u8],
    size: u64,
    attributes: &Attributes,
) -> io::Result<Header> {
    let mut header = Header::new_ustar();
    header.as_mut_bytes()[..path.len()].copy_from_slice(path);
    header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link);
    header.set_entry_type(kind);
    header.set_mode(attributes.mode);
    header.set_uid(attributes.uid.into());
    header.set_gid(attributes.gid.into());
    header.set_mtime(attributes.mtime.into());
    header.set_size(size);
    header.set_device_major(0)?;
    header.set_device_minor(0)?;
    header.set_cksum();
    Ok(header)
}

/// Fills up to the next block.
fn pad(output: &mut impl Write, size: u64) -> io::Result<()> {
    let missing = usize::try_from(size.next_multiple_of(512) - size).unwrap_or(0);
    output.write_all(&[0; 512][..missing])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let long = "n".repeat(180);
        let mut tar = tar::Builder::new(Vec::new());
        for path in ["a/x", &format!("a/{long}")] {
            let mut header = Header::new_gnu();
            header.set_size(3);
            header.set_mode(0o4755);
            header.set_uid(3_000_000);
            header.set_mtime(77);
            tar.append_data(&mut header, path, &b"abc"[..]).unwrap();
        }
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Link);
        header.set_size(0);
        tar.append_link(&mut header, "b", format!("a/{long}")).unwrap();
        header.set_entry_type(EntryType::Symlink);
        tar.append_link(&mut header, "s", format!("/{long}")).unwrap();
        let mut header = Header::new_gnu();
        header.set_size(0);
        tar.append_data(&mut header, "a/.wh..wh..opq", &b""[..]).unwrap();
        tar.append_data(&mut header, "c/.wh.gone", &b""[..]).unwrap();
        let bytes = tar.into_inner().unwrap();

        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let tree = Tree::read(&file, bytes.len() as u64).unwrap();
        let mut clean = Vec::new();
        write_tar(&tree, &mut file, &mut clean).unwrap();
        let mut again = tempfile::tempfile().unwrap();
        again.write_all(&clean).unwrap();
        // Our form is a fixed point but for overlayfs' attribute, which a layer from outside may not set.
        let second = Tree::read(&again, clean.len() as u64).unwrap();
        assert_eq!(
            tree.nodes.keys().collect::<Vec<_>>(),
            second.nodes.keys().collect::<Vec<_>>()
        );
        assert_eq!(second.nodes[&b"c/gone"[..]], Node::Whiteout);
        let Node::File { attributes, content } = &second.nodes[&b"b"[..]] else {
            panic!("a file is wanted")
        };
        assert_eq!(
            (attributes.uid, attributes.mode, attributes.mtime),
            (3_000_000, 0o4755, 77)
        );
        let linked = second.content(format!("a/{long}").as_bytes()).unwrap();
        assert_eq!(*content, linked);
    }
}
