// Connects the drawing surface to a gr.HTML component of the page (vlmbench.demo.serve).
const size = () => [props.wide, props.high];
const board = mountBoard(element, props.settings, {
  marks: m => {
    props.value = JSON.stringify(m);
  },
  insert: text => trigger('insert', { text }),
  open: file => {
    if (file.size > props.settings.max_bytes) {
      const most = props.settings.max_bytes / 1e6;
      return board.message(`${file.name} is larger than ${most} MB: make it smaller first`, true);
    }
    // gradio puts the button's file input before the button
    let input = document.getElementById('open-picture');
    while (input && input.type !== 'file') input = input.previousElementSibling;
    const carrier = new DataTransfer();
    carrier.items.add(file);
    input.files = carrier.files;
    input.dispatchEvent(new Event('change', { bubbles: true }));
  },
});
const show = () => board.setImage(props.picture, ...size());
watch(['picture'], show);
watch(['note'], () => board.message(props.note[1], true));
watch(['value'], () => board.setMarks(JSON.parse(props.value || '[]')));
show();
