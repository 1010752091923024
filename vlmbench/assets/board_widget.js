// Connects the drawing surface to the traits of an anywidget (vlmbench.demo.board).
export default {
  render({ model, el }) {
    const board = mountBoard(el, model.get('settings'), {
      marks: m => {
        model.set('marks', m);
        model.save_changes();
      },
      insert: text => model.send({ insert: text }),
      open: async file => {
        const limit = model.get('settings').max_bytes;
        if (file.size > limit) {
          const most = Math.floor(limit / 1e6);
          return board.message(`${file.name} is larger than ${most} MB`, true);
        }
        model.send({ open: file.name }, undefined, [await file.arrayBuffer()]);
      },
    });
    const show = () => board.setImage(model.get('image'), ...model.get('size'));
    model.on('change:image', show);
    model.on('change:marks', () => board.setMarks(model.get('marks')));
    model.on('change:note', () => board.message(model.get('note'), true));
    show();
    board.setMarks(model.get('marks'));
  },
};
